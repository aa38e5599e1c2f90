"""Published formats of MMDiT weights: where their tensors go.

| format | examples |
|---|---|
| single | `sd3_medium.safetensors` and those with text encoders; Stability AI's names |
| diffusers | folder `transformer` of a pipeline, `SD3Transformer2DModel` |

Both norms that have no gate, the last block's of the text and the one before the head,
have `[shift, scale]` in single files and here, and `[scale, shift]` in diffusers.
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.mapping import TensorRule
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.checkpoints.torch_rules import (
    convolution,
    linear,
    root,
    thirds,
    transposed,
)

Format = Literal["single", "diffusers"]
FORMATS: tuple[Format, ...] = ("single", "diffusers")
# Regexes of a name that every checkpoint of the format has.
MARKS = (
    r"joint_blocks\.0\.context_block\.attn\.qkv\.weight",
    r"transformer_blocks\.0\.attn\.add_q_proj\.weight",
)
POSITIONS = ("pos_embed", "pos_embed.pos_embed")
PATCH = ("x_embedder.proj", "pos_embed.proj")
_TIME_TEXT = "time_text_embed.{}_embedder.linear_{}"
LAYERS = {  # linear layers outside of the blocks: our path, and both formats' names
    "time/fc1": ("t_embedder.mlp.0", _TIME_TEXT.format("timestep", 1)),
    "time/fc2": ("t_embedder.mlp.2", _TIME_TEXT.format("timestep", 2)),
    "pooled/fc1": ("y_embedder.mlp.0", _TIME_TEXT.format("text", 1)),
    "pooled/fc2": ("y_embedder.mlp.2", _TIME_TEXT.format("text", 2)),
    "context": ("context_embedder", "context_embedder"),
    "modulation": ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    "head": ("final_layer.linear", "proj_out"),
}
BLOCKS = ("joint_blocks", "transformer_blocks")
IN_BLOCK = {  # those of a block, without the single files' fused ones
    "image/modulation": ("x_block.adaLN_modulation.1", "norm1.linear"),
    "image/attn/q": (None, "attn.to_q"),
    "image/attn/k": (None, "attn.to_k"),
    "image/attn/v": (None, "attn.to_v"),
    "image/attn/proj": ("x_block.attn.proj", "attn.to_out.0"),
    "image/mlp/fc1": ("x_block.mlp.fc1", "ff.net.0.proj"),
    "image/mlp/fc2": ("x_block.mlp.fc2", "ff.net.2"),
    "context/modulation": ("context_block.adaLN_modulation.1", "norm1_context.linear"),
    "context/attn/q": (None, "attn.add_q_proj"),
    "context/attn/k": (None, "attn.add_k_proj"),
    "context/attn/v": (None, "attn.add_v_proj"),
    "context/attn/proj": ("context_block.attn.proj", "attn.to_add_out"),
    "context/mlp/fc1": ("context_block.mlp.fc1", "ff_context.net.0.proj"),
    "context/mlp/fc2": ("context_block.mlp.fc2", "ff_context.net.2"),
}
FUSED = {"image": "x_block.attn.qkv", "context": "context_block.attn.qkv"}
SWAPPED = ("modulation", "last/context/modulation")  # in diffusers
# Names of other models' tensors, and what these are.
OTHERS = {
    r".*\.(lora_(A|B|up|down)|alpha)(\..*)?": "a LoRA of a model, and no model",
    r"(joint_blocks\.\d+\.x_block|transformer_blocks\.\d+)\.attn2\..*": (
        "Stable Diffusion 3.5 medium: its blocks have a second attention"
    ),
    r"double_blocks\..*|single_(transformer_)?blocks\..*": "Flux",
    r".*\.(ln_[qk]|norm_(added_)?[qk])\.weight": (
        "Stable Diffusion 3.5, or another model that normalises queries and keys"
    ),
    r"controlnet_blocks\..*": "a ControlNet",
    r"(joint|single)_transformer_blocks\..*": "AuraFlow",
    r"input_blocks\..*|down_blocks\..*": "a UNet, of Stable Diffusion 1, 2 or XL",
}


def recognised(checkpoint: Checkpoint) -> tuple[Checkpoint, Format]:
    """Returns the tensors without a prefix, and their format.

    Raises:
      CheckpointError: another model, which is named if it is known; no known format.
    """
    if checkpoint.path.suffix == ".gguf":
        raise CheckpointError(
            checkpoint.path, "an MMDiT in GGUF: expected .safetensors or a folder"
        )
    checkpoint = checkpoint.unwrapped(*MARKS)
    names = sorted(checkpoint.tensors)
    for pattern, what in OTHERS.items():
        if found := next((n for n in names if re.fullmatch(pattern, n)), None):
            raise CheckpointError(
                checkpoint.path,
                f"it is {what} ({found}): expected Stable Diffusion 3 medium",
            )
    for form, mark in zip(FORMATS, MARKS, strict=True):
        if any(re.fullmatch(mark, name) for name in names):
            return checkpoint, form
    raise CheckpointError(
        checkpoint.path,
        "no MMDiT of a known format: expected the names of Stability AI or of "
        f"diffusers, found {', '.join(names[:5])} ({len(names)} in all)",
    )


def depth_of(checkpoint: Checkpoint, form: Format) -> int:
    """Counts the blocks.

    Counted, not the largest: a number that leaves a gap is a tensor without a place.
    """
    name = rf"{_of(BLOCKS, form)}\.(\d{{1,9}})\..*"
    matches = (re.fullmatch(name, tensor) for tensor in checkpoint.tensors)
    return len({match[1] for match in matches if match})


def rules(form: Format, depth: int) -> list[TensorRule]:
    """Returns the rules for the tensors of a format."""
    made = [TensorRule(re.escape(_of(POSITIONS, form)), ("positions",), _square)]
    made += convolution(re.escape(_of(PATCH, form)), "patch")
    last = f"{_of(BLOCKS, form)}.{depth - 1}."
    if form == "diffusers":
        swapped = LAYERS["modulation"][1], last + IN_BLOCK["context/modulation"][1]
        for path, name in zip(SWAPPED, swapped, strict=True):
            made += _swapped(name, path)
    for path, names in LAYERS.items():
        made += linear(re.escape(_of(names, form)), path)
    every = rf"{_of(BLOCKS, form)}\.(\d+)\."
    for start, place in ((re.escape(last), "last"), (every, "blocks/{0}")):
        for path, names in IN_BLOCK.items():
            if (name := _of(names, form)) is not None:
                made += linear(start + re.escape(name), f"{place}/{path}")
        for stream, name in FUSED.items() if form == "single" else ():
            made += _fused(start + re.escape(name), f"{place}/{stream}/attn")
    return made


def diffusers_name(path: str, depth: int) -> str:
    """Returns the name of a parameter in diffusers, by its path.

    >>> diffusers_name("blocks/3/image/attn/q/kernel", 24)
    'transformer_blocks.3.attn.to_q.weight'
    >>> diffusers_name("last/context/modulation/bias", 24)
    'transformer_blocks.23.norm1_context.linear.bias'
    """
    if path == "positions":
        return POSITIONS[1]
    layer, _, kind = path.rpartition("/")
    end = "weight" if kind == "kernel" else kind
    if layer == "patch":
        return f"{PATCH[1]}.{end}"
    if layer in LAYERS:
        return f"{LAYERS[layer][1]}.{end}"
    match = re.fullmatch(r"(?:blocks/(\d+)|last)/(.*)", layer)
    if match is None:
        raise ValueError(f"{path} is no parameter of an MMDiT.")
    number = depth - 1 if match[1] is None else match[1]
    return f"{BLOCKS[1]}.{number}.{IN_BLOCK[match[2]][1]}.{end}"


def halves_swapped(tensor: np.ndarray) -> np.ndarray:
    """Swaps the halves of the first axis.

    >>> halves_swapped(np.arange(4)).tolist()
    [2, 3, 0, 1]

    Raises:
      ValueError: its length is odd.
    """
    if tensor.shape[0] % 2:
        raise ValueError("expected two halves")
    return np.concatenate(np.split(tensor, 2)[::-1])


def _of(names: tuple, form: Format) -> str:
    return names[FORMATS.index(form)]


def _square(tensor: np.ndarray) -> Sequence[np.ndarray]:
    """Turns `[1, side * side, D]` into `[side, side, D]`."""
    if tensor.ndim != 3 or tensor.shape[0] != 1:
        raise ValueError("expected [1, positions, width]")
    side = root(tensor.shape[1])
    return (tensor.reshape(side, side, -1),)


def _swapped(name: str, path: str) -> list[TensorRule]:
    kinds: dict[str, tuple[str, Callable]] = {
        "weight": ("kernel", lambda tensor: transposed(halves_swapped(tensor))),
        "bias": ("bias", lambda tensor: (halves_swapped(tensor),)),
    }
    return [
        TensorRule(re.escape(f"{name}.{theirs}"), (f"{path}/{ours}",), make)
        for theirs, (ours, make) in kinds.items()
    ]


def _fused(pattern: str, path: str) -> list[TensorRule]:
    return [
        TensorRule(
            rf"{pattern}\.{theirs}", tuple(f"{path}/{n}/{ours}" for n in "qkv"), thirds
        )
        for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
    ]
