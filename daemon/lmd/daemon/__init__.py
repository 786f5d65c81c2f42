"""The daemon: services, pulls, residency, life cycle."""
