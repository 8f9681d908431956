"""Studies over many runs: comparisons, costs."""
