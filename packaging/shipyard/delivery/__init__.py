"""Delivery: a release approved, promoted, rolled out to all targets, compared with what is live, and taken back."""
