"""The NNX binding: adapts a Flax NNX model in place of its layers."""
