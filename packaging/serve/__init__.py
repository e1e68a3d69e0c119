"""The runtime that ships inside artifacts: it imports nothing of Shipyard's but itself."""

import os

# ONNX Runtime 1.29 and newer looks up a telemetry host and writes a device id unless this is set before its import;
# here it is set for whatever imports any part of us, which no caller can forget
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
