"""Task adapters generated from instructions, trained and served on a Ray cluster."""

__version__ = "0.1.0"
