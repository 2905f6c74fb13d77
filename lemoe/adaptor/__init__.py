"""Adaptors: experts, their router and the record of their rounds, as one value and as one file."""
