"""Inside a guest, over SSH."""
