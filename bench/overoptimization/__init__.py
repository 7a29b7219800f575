"""Over-optimization of reward models on the embedded world, after Gao et al. (arXiv 2210.10760)."""
