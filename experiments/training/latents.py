"""Latents of photographs, whose moments an autoencoder gives once for a whole run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from experiments.data.source import Source
from experiments.training.flow_matching import PRIOR
from snella_jax.models.sd3.vae import VAE

Moments = Mapping[str, Float[np.ndarray, "N h w C"]]  # mean, and logvar of a VAE
Arrays = dict[str, np.ndarray]


def moments(vae: VAE | None, images: UInt8[np.ndarray, "N H W 3"]) -> Moments:
    """Returns `mean` and `logvar` of images' latents, on the host.

    They are computed an image at a time. Without a VAE the latents are the pixels, from
    -1 to 1, and there is no `logvar`.
    """
    pixels = images.astype(np.float32) / np.float32(127.5) - 1
    if vae is None:
        return {"mean": pixels}
    graphdef, state = nnx.split(vae)

    @jax.jit
    def encode(state: nnx.State, image: jax.Array) -> Any:
        return nnx.merge(graphdef, state).encode(image[None])

    found = [jax.device_get(encode(state, image)) for image in pixels]
    mean, logvar = (np.concatenate(own) for own in zip(*found, strict=True))
    return {"mean": mean, "logvar": logvar}


@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """Source of photographs with the moments of their latents."""

    photographs: Source
    moments: Moments

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        own = {name: values[index] for name, values in self.moments.items()}
        return {**self.photographs[index], **own}


@dataclasses.dataclass(frozen=True, eq=False)
class Class:
    """Pictures of a concept's class, for prior preservation.

    Attributes:
      moments: of their latents.
      text: arrays of their encoded prompt, `context` and `pooled`.
    """

    moments: Moments
    text: Arrays


@dataclasses.dataclass(frozen=True, eq=False)
class WithText:
    """Turns an example of `Latents` into arrays: its moments and an encoded prompt.

    Attributes:
      text: arrays of the prompt, `context [S, D]` and `pooled [P]`.
      prior: pictures of the class, of which every example gets one at random; None for
        none.
      evaluated: most examples of a batch that is evaluated.
    """

    text: Arrays
    prior: Class | None = None
    evaluated: int = 1

    def prepare(self, example: Any, rng: np.random.Generator) -> Arrays:
        """Returns `mean`, perhaps `logvar`, `context`, `pooled`; `prior_` of each."""
        own = {name: example[name] for name in ("mean", "logvar") if name in example}
        if self.prior is None:
            return {**own, **self.text}
        other = self.prior.moments
        index = int(rng.integers(len(other["mean"])))
        drawn = {name: values[index] for name, values in other.items()}
        of_class = {**drawn, **self.prior.text}
        return {**own, **self.text, **{PRIOR + n: x for n, x in of_class.items()}}
