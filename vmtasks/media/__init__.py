"""What guests boot from."""
