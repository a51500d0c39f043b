"""An installer CD made of Debian packages."""
