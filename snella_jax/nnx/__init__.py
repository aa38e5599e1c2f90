"""The NNX binding: adapts a Flax NNX model by new classes for its layers."""
