"""Sources of rows: local files, datasets of the hub, and mixtures of several sources."""
