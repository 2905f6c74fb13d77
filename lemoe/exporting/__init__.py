"""A whole model folder that transformers loads by itself: the base's files, an adaptor, and code that joins them."""
