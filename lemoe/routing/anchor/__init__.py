"""The router of preset `anchor`: reads words, subjects and questions from tokens, and opens a gate for an edit."""
