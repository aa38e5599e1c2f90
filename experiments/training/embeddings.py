"""Embeddings of images, computed once, for a SAM whose encoder stays as it is.

A file holds those of a split: for each image that of the image and, where training
flips images, that of its mirror image, float32. Files are read as they are needed and
appear whole or not at all.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float
from rich.console import Console

from experiments import terminal
from experiments.data.mask_transforms import MaskTransform
from experiments.data.source import Source
from experiments.training import evaluation, sharding
from experiments.training.objective import Batch
from experiments.training.segmentation import Segmentation
from snella_jax.files.atomic import whole_file
from snella_jax.models.sam import Sam

Views = Float[np.ndarray, "N V h w C"]  # V: the image, and perhaps its mirror image


@dataclasses.dataclass(frozen=True, eq=False)
class Embedded:
    """Source of pairs with the embeddings of their images."""

    source: Source
    embeddings: Views

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.source[index], "embeddings": self.embeddings[index]}


@dataclasses.dataclass(frozen=True)
class EmbeddedTransform:
    """Turns an `Embedded` pair into arrays: the embedding stands for the image."""

    transform: MaskTransform

    @property
    def evaluated(self) -> int:
        """Examples of a batch that is evaluated."""
        return self.transform.evaluated

    def prepare(self, example: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns `embedding`, `mask` and `inside`, flipped as the transform flips."""
        flipped = self.transform.flips(rng)
        own = np.array(example["embeddings"][int(flipped)])
        return {"embedding": own, **self.transform.masks(example, flipped)}


@dataclasses.dataclass(frozen=True)
class OfEmbeddings(Segmentation):
    """Objective of batches with `embedding` in the place of `image`."""

    def masks(self, model: Any, batch: Batch) -> Float[Array, "B M h w"]:
        """Returns logits of masks."""
        return model.decode(batch["embedding"])[0]


def embedded(
    path: Path,
    model: Sam,
    source: Source,
    transform: MaskTransform,
    mesh: Mesh,
    console: Console,
) -> Embedded:
    """Returns a source with the embeddings in a file, which is made where it is not.

    Args:
      path: the file, of this source, this model and this transform alone.
      transform: one that flips has two views of an image.
    """
    if not path.exists():
        config = model.config
        views = _Views(transform)
        shape = len(source), views.count, *config.grid, config.width
        console.print(
            f"embeddings of {len(source)} images, {views.count} views of each: "
            f"{4 * np.prod(shape) / 1e6:,.0f} MB in {path}",
            soft_wrap=True,
        )
        with whole_file(path) as new:
            file = np.lib.format.open_memmap(new, "w+", np.float32, shape)
            _fill(file, model, source, views, mesh, console)
            file.flush()
    return Embedded(source, np.load(path, mmap_mode="r"))


@dataclasses.dataclass(frozen=True)
class _Views:
    """Turns a pair into the views of its image, `[V, size, size, 3]`."""

    transform: MaskTransform

    @property
    def count(self) -> int:
        return 1 + self.transform.flip

    @property
    def evaluated(self) -> int:
        return self.transform.evaluated

    def prepare(self, example: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        own = [self.transform.image(example, bool(flip)) for flip in range(self.count)]
        return {"image": np.stack(own)}


def _fill(
    file: Views,
    model: Sam,
    source: Source,
    views: _Views,
    mesh: Mesh,
    console: Console,
) -> None:
    graphdef, state = nnx.split(model)
    state = sharding.place(state, mesh)

    @jax.jit
    def encode(state: nnx.State, images: Array) -> Array:
        found = nnx.merge(graphdef, state).encode(images.reshape(-1, *images.shape[2:]))
        return found.reshape(*images.shape[:2], *found.shape[1:])

    with terminal.progress(console) as progress:
        bar = progress.add_task("embedding images", total=len(source))
        for batch in evaluation.batches(source, views, mesh):
            valid = np.asarray(batch["valid"])
            rows = np.asarray(batch["index"])[valid]
            file[rows] = np.asarray(encode(state, batch["image"]))[valid]
            progress.advance(bar, len(rows))
