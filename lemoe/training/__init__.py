"""How a round is taught: one record for each method, and what training has in common."""
