"""The runtime that ships inside artifacts: it imports nothing of Shipyard's but itself."""
