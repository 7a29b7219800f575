"""Benchmark of PPO on one GPU."""
