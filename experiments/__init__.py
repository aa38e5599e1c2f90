"""The paper's experiments, run from a clone: `python -m experiments.vtab --help`."""
