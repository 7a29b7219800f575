"""Runs on disk: their directories, locks, records and results, paths to their models, and the ranks that write."""
