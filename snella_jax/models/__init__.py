"""Plain Flax NNX models; none of them knows of SNELLA."""
