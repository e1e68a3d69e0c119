"""Pages: figures as self-contained HTML."""
