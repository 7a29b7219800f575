"""Benchmark of the memory plan against measured peaks."""
