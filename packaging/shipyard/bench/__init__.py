"""Bench: our CPU server beside others, each in an environment of its own."""
