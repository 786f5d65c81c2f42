"""The HTTP gateway: unmodified Ollama, OpenAI and Anthropic clients talk to the application through it."""
