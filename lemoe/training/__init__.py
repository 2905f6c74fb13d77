"""Training: one record for each method, the training of a round by each, and what they have in common."""
