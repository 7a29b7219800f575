"""The stages: one module for each way to run an option of conf/stage."""
