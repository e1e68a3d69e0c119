"""The edge: Greengrass components, the process that serves on a device, and its protocol with the center."""
