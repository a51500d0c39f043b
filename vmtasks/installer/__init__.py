"""The installer CD: downloaded, or composed from packages."""
