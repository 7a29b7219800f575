"""`python -m rlhf_trl.cli`, which does what `train.py` does."""

from rlhf_trl.cli.main import main

if __name__ == "__main__":
    main()
