"""A guest on real media, from download to removal, with a report."""
