"""Measuring as the field does: see README.md."""
