"""An OpenAI-compatible HTTP server for a base model with adaptors (extra `serve`)."""
