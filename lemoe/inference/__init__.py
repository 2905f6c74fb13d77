"""The edited model at work: an adaptor in a base, what it writes, and what people ask of it."""
