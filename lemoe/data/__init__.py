"""Input and output files: edits in all known data set formats, their conflicts, and atomic writes."""
