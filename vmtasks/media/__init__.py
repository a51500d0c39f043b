"""Boot media: disks, CDs, and the templates and trees that CDs are made of."""
