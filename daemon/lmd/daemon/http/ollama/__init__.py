"""Ollama's API: `/api/*`, and what stands at `/`."""
