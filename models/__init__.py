"""What the fleet is: configuration, release file and the sub-models."""
