"""The interactive session of `lm run`."""
