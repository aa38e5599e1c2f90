"""Pictures that a model draws of prompts, each in a PNG that is whole or not there.

`PROMPT_NUMBER.png` of a folder, both with two digits, is picture `NUMBER` of prompt
`PROMPT`. It depends on the seed, the prompt's text and its number alone: one that is
drawn again, after a run was killed, has the same bits.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8
from PIL import Image
from rich.console import Console

from experiments import terminal
from experiments.data.source import CorruptImageError, decoding
from experiments.files import MismatchError
from snella_jax.files.atomic import whole_file
from snella_jax.models.sd3 import Pipeline


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Settings of pictures that are drawn.

    Attributes:
      size: side of a picture in pixels.
      each: pictures of a prompt.
      batch: pictures that are drawn at once.
      steps: steps of the sampler.
      guidance: strength of the prompt.
      seed: seed of the noise.
    """

    size: int
    each: int = 4
    batch: int = 4
    steps: int = 28
    guidance: float = 7.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Prompts with what a model is told of them, on the host.

    Attributes:
      prompts: texts.
      context: `[P, S, D]`.
      pooled: `[P, E]`.
    """

    prompts: tuple[str, ...]
    context: np.ndarray
    pooled: np.ndarray

    @classmethod
    def of(cls, pipeline: Pipeline, prompts: Sequence[str]) -> Self:
        """Encodes prompts."""
        context, pooled = pipeline.encode(prompts)
        return cls(tuple(prompts), np.asarray(context), np.asarray(pooled))

    @property
    def first(self) -> dict[str, np.ndarray]:
        """Arrays of the first prompt, `context` and `pooled`, for batches."""
        return {"context": self.context[0], "pooled": self.pooled[0]}

    def rows(self, places: Sequence[int]) -> tuple[Any, Any]:
        """Returns context and pooled of some prompts, which may repeat."""
        own = np.asarray(places)
        return self.context[own], self.pooled[own]


def path(folder: Path, prompt: int, number: int) -> Path:
    """Returns the file of a picture.

    >>> path(Path("pictures/lora"), 3, 1).as_posix()
    'pictures/lora/03_01.png'
    """
    return folder / f"{prompt:02d}_{number:02d}.png"


def draw(
    folder: Path,
    pipeline: Pipeline,
    texts: Encoded,
    empty: Encoded,
    how: Drawing,
    console: Console,
    title: str,
) -> None:
    """Draws all pictures of some prompts that a folder lacks.

    A batch of which some are missing is drawn whole, as it was the first time.

    Args:
      folder: has the pictures of one model alone.
      pipeline: the model; it needs no text encoders.
      texts: the prompts.
      empty: the prompt that pictures are led away from.
      how: numbers and size of the pictures.
      console: where progress is shown.
      title: stands before the bar.
    """
    every = list(itertools.product(range(len(texts.prompts)), range(how.each)))
    with terminal.progress(console) as progress:
        bar = progress.add_task(title, total=len(every))
        for start in range(0, len(every), how.batch):
            own = every[start : start + how.batch]
            if not all(path(folder, *place).exists() for place in own):
                _write(folder, own, _drawn(pipeline, texts, empty, own, how))
            progress.advance(bar, len(own))


def read(folder: Path, prompts: int, each: int) -> UInt8[np.ndarray, "P K H W 3"]:
    """Returns the pictures of a folder.

    Raises:
      FileNotFoundError: one is missing.
      MismatchError: one is damaged, or of another size.
    """
    rows = [
        [_pixels(path(folder, prompt, number)) for number in range(each)]
        for prompt in range(prompts)
    ]
    shapes = {pixels.shape for row in rows for pixels in row}
    if len(shapes) > 1:
        raise MismatchError(f"{folder} has pictures of several sizes: {shapes}.")
    return np.stack([np.stack(row) for row in rows])


def key_of(seed: int, prompt: str, number: int) -> Array:
    """Returns the key of a picture's noise."""
    text = zlib.crc32(prompt.encode())
    return jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed), np.uint32(text)), number
    )


def _drawn(
    pipeline: Pipeline,
    texts: Encoded,
    empty: Encoded,
    places: Sequence[tuple[int, int]],
    how: Drawing,
) -> UInt8[np.ndarray, "B H W 3"]:
    """Returns pictures; a batch that is not full is filled up, for one shape of all."""
    filled = [*places, *[places[-1]] * (how.batch - len(places))]
    keys = [key_of(how.seed, texts.prompts[prompt], n) for prompt, n in filled]
    found = pipeline(
        texts.rows([prompt for prompt, _ in filled]),
        empty.rows([0]),
        steps=how.steps,
        guidance=how.guidance,
        size=how.size,
        key=jnp.stack(keys),
    )
    return np.asarray(found)[: len(places)]


def _write(
    folder: Path,
    places: Sequence[tuple[int, int]],
    pictures: UInt8[np.ndarray, "B H W 3"],
) -> None:
    for place, pixels in zip(places, pictures, strict=True):
        file = path(folder, *place)
        if not file.exists():
            with whole_file(file) as new:
                Image.fromarray(pixels).save(new, "PNG")


def _pixels(file: Path) -> UInt8[np.ndarray, "H W 3"]:
    try:
        with decoding(file.read_bytes(), file.name, 0) as image:
            return np.asarray(image.convert("RGB"))
    except CorruptImageError as error:
        raise MismatchError(f"{file} is damaged, delete it: {error}") from error
