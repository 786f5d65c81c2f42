"""The commands of `lm`, one module each."""
