"""Every training stage under DDP, FSDP2 and DeepSpeed on two CPU ranks: `python -m bench.engines`."""
