"""Ollama's API, as unmodified clients of it speak it."""
