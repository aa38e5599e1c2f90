"""The networks that judge pictures: CLIP and DINOv2, or a ViT and a probe for the toy.

The paper does not say which CLIP and which DINOv2 it measures with.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from experiments.data.transforms import Transform
from experiments.paths import at_home
from experiments.pretrained import (
    base_models,
    dinov2_saliency,
    emoji_probe,
    toy_judges,
    toy_sd3,
)
from experiments.training.judges import Features, Judges, Pictures, unit
from experiments.training.objective import Metric
from snella_jax.models import vit
from snella_jax.models.sd3 import clip
from snella_jax.models.sd3.tokenizers import clip_tokenizer

HUB = "https://huggingface.co"
CLIP_SITE = f"{HUB}/openai/clip-vit-base-patch32 (a folder), or ViT-B-32.pt of OpenAI"
DINO_SITE = f"{HUB}/facebook/dinov2-base"
DINO_SIDE = 224  # pixels
BATCH = 25  # pictures that a network sees at once
ALIGNMENT = Metric("text_alignment")


class Choice(Protocol):
    """Judges as a run's config names them."""

    @property
    def model(self) -> str: ...
    @property
    def clip_model(self) -> str: ...
    @property
    def dino_model(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class ClipAndDino:
    """CLIP for alignment, DINOv2's class token for variety.

    Each network is loaded when it has something to look at, and dropped afterwards.

    Attributes:
      clip: folder or archive of a CLIP, both towers.
      dino: weights of a DINOv2.
    """

    clip: Path
    dino: Path

    fit = ALIGNMENT

    def features(self, pictures: Pictures) -> Features:
        """Returns CLIP's embeddings, and DINOv2's normed class tokens.

        CLIP's pictures have a shorter side of its own size, DINOv2's one of 256, of
        which the middle 224 are seen; both bicubic.
        """
        tower, side = clip.load_image(self.clip), (DINO_SIDE, DINO_SIDE)
        dino, own = vit.load(self.dino, image_size=DINO_SIDE), tower.config
        seen = Transform(
            own.image_hw, "centre", own.pixel_mean, own.pixel_std, share=1.0
        )
        given = Transform(side, "centre", dino.config.pixel_mean, dino.config.pixel_std)
        return Features(
            _embedded(tower, lambda model, x: model(x), seen, pictures),
            _embedded(dino, lambda model, x: model.pooled(x), given, pictures),
        )

    def fits(
        self, features: Features, prompts: Sequence[str]
    ) -> Float[np.ndarray, " N"]:
        """Returns the cosines of CLIP's embeddings of pictures and prompts."""
        tower, different = clip.load(self.clip), list(dict.fromkeys(prompts))
        tokenizer = clip_tokenizer(self.clip if self.clip.is_dir() else None)
        tokens = tokenizer.padded(different, tower.config.positions)
        texts = unit(np.asarray(nnx.jit(lambda model, x: model(x)[1])(tower, tokens)))
        rows = [different.index(prompt) for prompt in prompts]
        return (unit(features.likeness) * texts[rows]).sum(1)


def load(config: Choice, class_name: str) -> Judges:
    """Returns the judges of a run.

    Args:
      config: the run's.
      class_name: noun for what pictures are to show.

    Raises:
      FileNotFoundError, ModuleNotFoundError: weights are missing; says where they are.
      ValueError: the toy's probe does not know the class.
    """
    if config.model == toy_sd3.NAME:
        return toy_judges.load(class_name)
    return ClipAndDino(*_paths(config))


def files(config: Choice) -> list[Path]:
    """Returns the files that judges are read from; raises as `load`."""
    if config.model == toy_sd3.NAME:
        return [emoji_probe.WEIGHTS, dinov2_saliency.path()]
    return [file for own in _paths(config) for file in base_models.files_at(own)]


def _paths(config: Choice) -> tuple[Path, Path]:
    """Returns the paths of CLIP and DINOv2."""
    found, missing = [], []
    for flag, site in (("clip_model", CLIP_SITE), ("dino_model", DINO_SITE)):
        path = at_home(getattr(config, flag))
        found.append(path)
        if not path.exists():
            missing.append(f"--{flag} {path}: get {site}.")
    if missing:
        raise FileNotFoundError(
            "\n".join(["Networks that measure pictures are missing.", *missing])
        )
    return found[0], found[1]


def _embedded(
    model: nnx.Module, call: Any, transform: Transform, pictures: Pictures
) -> Float[np.ndarray, "N D"]:
    """Returns what a network makes of pictures, in batches of one shape, float32."""
    rng = np.random.default_rng(0)  # of transforms that draw nothing
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, images: Array) -> Array:
        return call(nnx.merge(graphdef, state), images).astype(jnp.float32)

    found = []
    for start in range(0, len(pictures), BATCH):
        own = [transform(picture, rng) for picture in pictures[start : start + BATCH]]
        filled = [*own, *own[-1:] * (BATCH - len(own))]
        found.append(np.asarray(run(state, np.stack(filled)))[: len(own)])
    return np.concatenate(found)
