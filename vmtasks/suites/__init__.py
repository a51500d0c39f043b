"""Suites: sync, build, run, collect, and their last results."""
