"""The frozen base model: how it is found, loaded, inspected by structure, and run as little as possible."""
