"""Signs of trouble in a run, as pure functions of what it logs."""
