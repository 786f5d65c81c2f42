"""The `lm` command."""
