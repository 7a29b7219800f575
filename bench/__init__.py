"""Speed and memory of our PPO, of TRL 1.12's, and of a bare PyTorch loop, side by side: `make bench`."""
