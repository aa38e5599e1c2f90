"""Modules of one layer, for tests of what is adapted."""

from flax import nnx


class Doubled(nnx.Linear):
    """A user's own layer: a subclass of Linear with arithmetic of its own."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Holder(nnx.Module):
    """Gives a single layer the path `layer`."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)
