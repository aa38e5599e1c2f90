"""Batches and objectives of the step of each kind of model.

Images of noise with a class or, of a SAM, a mask of one half; texts of which all tokens
but the first are learnt; of an MMDiT, moments of latents and encoded prompts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.data.mask_transforms import MaskTransform
from experiments.training.answers import Answers
from experiments.training.classification import Classification
from experiments.training.flow_matching import FlowMatching
from experiments.training.objective import Objective
from experiments.training.segmentation import Segmentation
from snella_jax.models import llama, sam
from snella_jax.models.sd3 import mmdit, vae

CLASSES = 100  # VTAB-1k's largest common head (CIFAR-100)
PIXELS = 512  # side of an MMDiT's pictures
VAE = vae.PRESETS["sd3"]
PROMPT = 154  # tokens of a prompt in DreamBooth's training: 77 of CLIP and 77 of T5


def batch(config: Any, count: int, sequence: int | None) -> dict[str, Array]:
    """Returns a batch for the model of a config.

    Args:
      config: the model's.
      count: number of examples.
      sequence: tokens of a text; of a language model alone.
    """
    match config:
        case llama.LlamaConfig():
            learnt = jnp.arange(sequence, dtype=jnp.int32)
            rows = jnp.tile(learnt, (count, 1))
            return {
                "tokens": rows % config.vocab_size,
                "mask": jnp.ones(rows.shape, bool),
                "learnt": rows,
            }
        case mmdit.MMDiTConfig():
            side = PIXELS // VAE.factor
            moments = jnp.zeros((count, side, side, config.channels))
            return {
                "mean": moments,
                "logvar": moments,
                "context": jnp.zeros((count, PROMPT, config.context_dim)),
                "pooled": jnp.zeros((count, config.pooled_dim)),
            }
    shape = count, *config.image_hw
    image = jax.random.normal(jax.random.key(0), (*shape, config.channels))
    if isinstance(config, sam.SamConfig):
        mask = jnp.zeros(shape).at[:, : shape[1] // 2].set(1)
        return {"image": image, "mask": mask, "inside": jnp.ones(shape, bool)}
    return {"image": image, "label": jnp.arange(count) % CLASSES}


def objective(config: Any) -> Objective:
    """Returns what the model of a config learns."""
    match config:
        case llama.LlamaConfig():
            return Answers(())
        case sam.SamConfig():
            return Segmentation(MaskTransform(config.image_hw[0]))
        case mmdit.MMDiTConfig():
            return FlowMatching(scale=VAE.scale, shift=VAE.shift)
        case _:
            return Classification()
