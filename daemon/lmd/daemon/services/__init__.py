"""The gRPC services: thin adapters that translate messages, and hold no behaviour."""
