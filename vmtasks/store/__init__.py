"""What is kept by digest, shared by all projects of a user."""
