"""A small Stable Diffusion 3 of emoji: an MMDiT of pixels and one tower of texts.

`python -m experiments.pretrained.train_toy_sd3` made its weights, 11 MB of float16 in
`toy_sd3.safetensors`, from Twemoji (Copyright Twitter, Inc and other contributors, CC
BY 4.0). It draws 32 x 32 pixels, has no autoencoder, and knows the words of emoji's
names and of DreamBooth's prompts, through the merges of CLIP's tokenizer:

    pip install --no-deps open-clip-torch==3.3.0
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from experiments.pretrained import small_vit
from experiments.pretrained.toy_text import Words
from snella_jax.files.atomic import whole_file
from snella_jax.files.hosts import to_host
from snella_jax.models.sd3 import Pipeline, clip, mmdit
from snella_jax.models.sd3.text import OneTower
from snella_jax.models.sd3.tokenizers import clip_tokenizer

NAME = "toy"
WEIGHTS = Path(__file__).with_name("toy_sd3.safetensors")
SIZE = 32  # pixels
SHIFT = 1.0  # of the noise levels: pictures this small need no more noise
GUIDANCE = 3.0  # strength of prompts when it draws
IDS = "ids"  # name of the tensor with CLIP's ids of the rows


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Shape of a `Toy`.

    Attributes:
      width, depth, heads, patch: of the transformer, as in `MMDiTConfig`.
      text_width, text_depth, text_heads: of the tower, as in `ClipTextConfig`.
      length: tokens of a text, start and end included.
    """

    width: int = 144
    depth: int = 6
    heads: int = 6
    patch: int = 4
    text_width: int = 128
    text_depth: int = 3
    text_heads: int = 4
    length: int = 24


class Toy(nnx.Module):
    """Transformer and tower of texts, which train together."""

    def __init__(self, config: ToyConfig, rows: int, *, rngs: nnx.Rngs):
        """Makes a randomly initialised one.

        Args:
          config: its shape.
          rows: tokens that the tower knows.
        """
        c = self.config = config
        self.transformer = mmdit.MMDiT(
            mmdit.MMDiTConfig(
                width=c.width,
                depth=c.depth,
                heads=c.heads,
                channels=3,
                patch=c.patch,
                positions=SIZE // c.patch,
                context_dim=c.text_width,
                pooled_dim=c.text_width,
            ),
            rngs=rngs,
        )
        self.tower = clip.ClipText(
            clip.ClipTextConfig(
                width=c.text_width,
                depth=c.text_depth,
                heads=c.text_heads,
                vocab_size=rows,
                positions=c.length,
            ),
            rngs=rngs,
        )


def load(token: str = "", path: Path = WEIGHTS) -> Pipeline:
    """Loads the toy as a pipeline; its pictures have `size=SIZE`.

    Args:
      token: words that may be new to it; each new one gets a spare row.
      path: a file that `save` wrote.

    Raises:
      FileNotFoundError: there is no file.
      ModuleNotFoundError: CLIP's merges are not installed; says how to.
      ValueError: the file is damaged or none of a toy, or `token` has too many words.
    """
    config, ids = _header(path)
    words = Words(clip_tokenizer(), ids, config.length)
    toy = Toy(config, words.size, rngs=nnx.Rngs(0))
    small_vit.fill(toy, path, skip=IDS)
    return pipeline(toy, words.with_token(token))


def pipeline(toy: Toy, words: Words) -> Pipeline:
    """Returns what draws a toy's pictures."""
    encoder = OneTower(toy.tower, words)
    return Pipeline(toy.transformer, None, encoder, shift=SHIFT)


def save(toy: Toy, ids: Sequence[int], path: Path) -> None:
    """Writes weights in float16, the rows' ids and the config, whole or not at all."""
    state = nnx.to_flat_state(nnx.state(toy, nnx.Param))
    tensors: dict[str, np.ndarray] = {
        "/".join(map(str, name)): to_host(value[...]).astype(np.float16)
        for name, value in state
    }
    tensors[IDS] = np.asarray(ids, np.int32)
    metadata = {"config": json.dumps(dataclasses.asdict(toy.config))}
    with whole_file(path) as new:
        save_file(tensors, new, metadata)


def _header(path: Path) -> tuple[ToyConfig, list[int]]:
    """Reads the config and the ids of the rows.

    Raises:
      FileNotFoundError, ValueError: as `load`.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: python -m experiments.pretrained.train_toy_sd3 makes "
            "it."
        )
    try:
        with safe_open(path, "np") as file:
            fields: dict[str, Any] = json.loads(file.metadata()["config"])
            return ToyConfig(**fields), file.get_tensor(IDS).tolist()
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no toy's file, or damaged: {error}") from error


def count(toy: Toy) -> int:
    """Returns the number of parameters."""
    return sum(
        value[...].size for _, value in nnx.to_flat_state(nnx.state(toy, nnx.Param))
    )
