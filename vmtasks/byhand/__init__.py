"""A person at a guest's console, and a phase's script over SSH."""
