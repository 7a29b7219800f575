"""Command lines: the run of a stage, its dry run, pipelines and sweeps."""

import os
import sys

# Defaults of tqdm's bars, which it reads when it is imported. Those of libraries (a map over rows, the weights of a
# model) appear if they take seconds and leave no line behind; in a log file they are updated every half minute.
os.environ.setdefault("TQDM_DELAY", "2")
os.environ.setdefault("TQDM_LEAVE", "")  # as tqdm reads it: false
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "30")
