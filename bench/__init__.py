"""Measurements: ratios within one run against a named peer or limit, and whole-process figures."""
