"""Sweep files: what `ecg-jax sweep` runs."""
