"""`python -m ecg_jax COMMAND`: the same as `ecg-jax COMMAND`."""

from ecg_jax.cli import entry_point

if __name__ == "__main__":
    entry_point()
