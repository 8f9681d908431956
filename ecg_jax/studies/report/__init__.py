"""The page of `ecg-jax report`: studies, or probes side by side with their baselines, as HTML, CSV and LaTeX."""
