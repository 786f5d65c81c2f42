"""The private frames between daemon and runner."""
