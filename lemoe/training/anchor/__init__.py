"""Training of preset `anchor`: texts made from the edits, batches of them, and all experts at once."""
