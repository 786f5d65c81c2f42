"""The version of the product and of this API."""

__version__ = "0.1.0"
API_VERSION = 1
