"""Exporting a complete model folder for transformers: the base's files, an adaptor, and code that applies it."""
