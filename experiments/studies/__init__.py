"""Studies: ablations, the comparison of methods, kernels, frozen features."""
