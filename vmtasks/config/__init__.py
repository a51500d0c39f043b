"""What users write, parsed once into frozen values."""
