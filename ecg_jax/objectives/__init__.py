"""Self-supervised objectives: a module with its heads plus a pure loss function each."""
