"""The edited model at work: an adaptor inserted into a base, generation, and prompts with their answers."""
