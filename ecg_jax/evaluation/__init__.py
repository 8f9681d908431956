"""Tasks, features, heads, metrics and statistics of a probe."""
