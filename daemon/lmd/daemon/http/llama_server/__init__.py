"""llama-server's API: ranking, tokens, templates."""
