"""Recordings, their preprocessing, the on-disk store and the input pipeline. Imports nothing from the rest of the package but `errors`."""
