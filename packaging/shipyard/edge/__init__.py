"""Edge: components, devices and what both have to do with the center."""
