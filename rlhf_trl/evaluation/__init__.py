"""What a trained policy is worth: comparisons on held-out prompts, their statistics and tables."""
