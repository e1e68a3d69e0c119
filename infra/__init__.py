"""Where the fleet runs: one CDK stack a concern, wired by app.py."""
