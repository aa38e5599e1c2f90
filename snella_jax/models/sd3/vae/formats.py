"""Published formats of the autoencoder: where their tensors go.

| format | examples |
|---|---|
| Stability's names | `sd3_medium.safetensors`, behind `first_stage_model.` |
| folder of diffusers | `AutoencoderKL`, `vae/diffusion_pytorch_model.safetensors` |

Diffusers counts the decoder's levels from the latents, Stability and we from the
images. Stability's attention is made of convolutions of one place.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from snella_jax.models.checkpoints.mapping import TensorRule
from snella_jax.models.checkpoints.torch_rules import affine, convolution
from snella_jax.models.sd3.vae.config import VAEConfig


@dataclass(frozen=True)
class Names:
    """A format's names below `encoder.` and `decoder.`.

    Attributes:
      norm: norm before the last convolution.
      level: level of the `{way}` down or up, with its number.
      block: block of a level, before its number.
      sample: convolution that goes to the next level, of one on the `{way}`.
      shortcut: convolution beside a block.
      middle: block, attention and block between the levels.
      attention: norm, q, k, v and last projection of the attention.
      reversed: True if the decoder's levels are counted from the latents.
    """

    norm: str
    level: str
    block: str
    sample: str
    shortcut: str
    middle: tuple[str, str, str]
    attention: tuple[str, str, str, str, str]
    reversed: bool


STABILITY = Names(
    norm="norm_out",
    level="{way}.{level}",
    block="block",
    sample="{way}sample.conv",
    shortcut="nin_shortcut",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    attention=("norm", "q", "k", "v", "proj_out"),
    reversed=False,
)
DIFFUSERS = Names(
    norm="conv_norm_out",
    level="{way}_blocks.{level}",
    block="resnets",
    sample="{way}samplers.0.conv",
    shortcut="conv_shortcut",
    middle=(
        "mid_block.resnets.0",
        "mid_block.attentions.0",
        "mid_block.resnets.1",
    ),
    attention=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    reversed=True,
)
# What only one of the formats has a tensor of.
MARKS = {
    "encoder.mid.block_1.norm1.weight": STABILITY,
    "encoder.mid_block.resnets.0.norm1.weight": DIFFUSERS,
}


def rules(names: Names, config: VAEConfig) -> list[TensorRule]:
    """Returns the rules for the tensors of a format."""
    made = []
    for half, way in (("encoder", "down"), ("decoder", "up")):
        end = re.escape(f"{half}.{names.norm}")
        made += convolution(rf"{half}\.conv_in", f"{half}/conv_in")
        made += affine(end, f"{half}/norm")
        made += convolution(rf"{half}\.conv_out", f"{half}/conv_out")
        first, attention, second = (re.escape(f"{half}.{n}") for n in names.middle)
        made += _block(first, f"{half}/middle/0", names)
        made += _attention(attention, f"{half}/middle/1", names)
        made += _block(second, f"{half}/middle/2", names)
        for level in range(len(config.widths)):
            theirs = number(names, config, half, level)
            own = f"{half}.{names.level.format(way=way, level=theirs)}."
            blocks = re.escape(f"{own}{names.block}.") + r"(\d+)"
            made += _block(blocks, f"{half}/levels/{level}/blocks/{{0}}", names)
            sample = level if half == "encoder" else level - 1
            if 0 <= sample < len(config.widths) - 1:
                pattern = re.escape(own + names.sample.format(way=way))
                made += convolution(pattern, f"{half}/{way}/{sample}/conv")
    return made


def number(names: Names, config: VAEConfig, half: str, level: int) -> int:
    """Returns a format's number of a level.

    >>> number(DIFFUSERS, VAEConfig(), "decoder", 0)
    3
    """
    if half == "decoder" and names.reversed:
        return len(config.widths) - 1 - level
    return level


def _block(theirs: str, ours: str, names: Names) -> list[TensorRule]:
    made = []
    for index in (1, 2):
        made += affine(rf"{theirs}\.norm{index}", f"{ours}/norm{index}")
        made += convolution(rf"{theirs}\.conv{index}", f"{ours}/conv{index}")
    return made + convolution(rf"{theirs}\.{names.shortcut}", f"{ours}/shortcut")


def _attention(theirs: str, ours: str, names: Names) -> list[TensorRule]:
    norm, *projections = names.attention
    made = affine(rf"{theirs}\.{norm}", f"{ours}/norm")
    for plain, path in zip(projections, ("q", "k", "v", "proj"), strict=True):
        name = re.escape(plain)
        kernel = f"{ours}/{path}/kernel"
        made += [
            TensorRule(rf"{theirs}\.{name}\.weight", (kernel,), _matrix),
            TensorRule(rf"{theirs}\.{name}\.bias", (f"{ours}/{path}/bias",)),
        ]
    return made


def _matrix(tensor: np.ndarray) -> Sequence[np.ndarray]:
    """Turns `[out, in]`, or a convolution of one place, into `[in, out]`."""
    if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    return (tensor.T,)
