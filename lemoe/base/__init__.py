"""The frozen base model: found, loaded, read by its structure, and run as little as possible."""
