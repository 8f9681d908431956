"""Readers: one module per file format, each yields `Recording`."""
