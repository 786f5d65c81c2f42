"""OpenAI's API: models, chats, completions, embeddings."""
