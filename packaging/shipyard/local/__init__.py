"""Rehearse a deployment on this machine: the real CDK CLI against a local imitation of AWS, without an account."""
