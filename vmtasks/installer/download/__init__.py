"""Files over HTTP: resumed, held against their digest, decompressed on the way."""
