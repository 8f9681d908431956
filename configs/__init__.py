"""ml_collections config files: what a run is."""
