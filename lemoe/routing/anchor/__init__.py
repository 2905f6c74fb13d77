"""The router of preset `anchor`: from tokens to words, subjects and questions, and a gate that they open."""
