"""In which rounds edits are taught."""
