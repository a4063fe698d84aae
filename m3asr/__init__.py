"""Conformer mixture-of-experts speech recognition: one model, several engines."""

__version__ = "0.1.0"
