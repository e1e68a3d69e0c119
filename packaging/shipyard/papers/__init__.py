"""Papers: what tells of a release in forms that others read, beside the signed file."""
