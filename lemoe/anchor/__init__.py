"""Preset `anchor`: an edit's own tokens are its key, a gate opens on its subject, a small expert of its own answers."""
