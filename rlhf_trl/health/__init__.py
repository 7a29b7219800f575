"""Signs of trouble in a run: pure functions of its metrics."""
