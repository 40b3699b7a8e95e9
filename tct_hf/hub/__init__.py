"""Cards and releases."""
