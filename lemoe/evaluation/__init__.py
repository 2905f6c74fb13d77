"""What editing did: metrics, how they are scored, and methods side by side."""
