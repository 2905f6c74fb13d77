"""Methods whose rounds change what earlier rounds learned, for comparison alone."""
