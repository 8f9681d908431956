"""State, optimiser, devices, checkpoints and metric writers of a training run."""
