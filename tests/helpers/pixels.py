"""A second objective: regression of every pixel, with examples of their own sizes.

Its metrics are the mean absolute error at an example's own size, from a host stage, and
the mean squared error at the model's size, from the devices.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.training.objective import Metric

SIDE = 4
SIGMA = 0.1  # of the noise on training images


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images of several sizes, whose targets are some function of them."""

    count: int
    seed: int

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        image = rng.random(rng.integers(SIDE, 3 * SIDE, 2), np.float32)
        return {"image": image, "target": np.sin(4 * image)}


class Nearest:
    """Arrays of the model's size, by nearest neighbours."""

    evaluated = 256

    def prepare(self, example, rng):
        return {n: resized(example[n], (SIDE, SIDE)) for n in ("image", "target")}


def resized(image, size):
    """Nearest neighbours, from the middle of each pixel."""
    rows, columns = (
        (np.arange(new) * 2 + 1) * old // (2 * new)
        for old, new in zip(image.shape, size, strict=True)
    )
    return image[rows][:, columns]


class PixelNet(nnx.Module):
    """A perceptron of two hidden layers for each pixel."""

    def __init__(self, rngs):
        self.stem = nnx.Linear(1, 8, rngs=rngs)
        self.body = nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, images):
        x = jax.nn.relu(self.stem(images[..., None]))
        return self.head(jax.nn.relu(self.body(x)))[..., 0]


class Regression:
    """The objective; the host's error is followed, and less of it is better."""

    metrics = (Metric("error", more_is_better=False), Metric("mse", False))

    def loss(self, model, batch, key):
        noise = SIGMA * jax.random.normal(key, batch["image"].shape)
        return jnp.square(model(batch["image"] + noise) - batch["target"]).mean()

    def outputs(self, model, batch):
        return {"pixels": model(batch["image"])}

    def sums(self, outputs, batch):
        each = jnp.square(outputs["pixels"] - batch["target"]).mean((1, 2))
        squares = jnp.where(batch["valid"], each, 0).sum()
        return {"squares": squares, "count": batch["valid"].sum()}

    def score(self, example, output):
        assert isinstance(output["pixels"], np.ndarray)
        found = resized(output["pixels"], example["target"].shape)
        return {"error": float(np.abs(found - example["target"]).mean())}

    def numbers(self, sums):
        count = sums["count"]
        return {"error": sums["error"] / count, "mse": sums["squares"] / count}

    def draw(self, axes, example, output):
        axes.imshow(resized(output["pixels"], example["target"].shape))
