"""Recordings, preprocessing, the on-disk store, the input pipeline. Of ecg_jax it imports only `errors`."""
