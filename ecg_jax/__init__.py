"""Pretrain, scale and probe ECG foundation models in JAX.

Importing the package imports nothing heavy: every command and module imports what it uses.
"""

__version__ = "0.1.0"
