"""Callbacks that watch and steer a training run, each useful on its own."""
