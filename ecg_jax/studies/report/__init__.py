"""The page of `ecg-jax report`: finished probes side by side, with their baselines, as HTML, CSV and LaTeX."""
