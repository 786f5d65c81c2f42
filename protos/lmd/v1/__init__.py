"""The public wire API `lmd.v1`: messages, services, and where they are served."""
