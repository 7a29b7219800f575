"""Benchmarks of the loop: a refreshed reward model, selected questions, judge labels, rounds on SmolLM2."""
