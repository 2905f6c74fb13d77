"""Methods whose rounds can neither be separated nor stacked, for comparison alone."""
