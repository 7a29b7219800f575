"""Command lines: the run of a stage, its dry run, pipelines and sweeps."""
