"""Tasks that ship with the package: examples, which nothing else here imports."""
