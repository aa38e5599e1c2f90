"""MobileSAM's names: where the tensors of its image encoder, a TinyViT, go.

The prompt encoder and the decoder have Meta's names.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from snella_jax.files.arrays import Stored
from snella_jax.models.checkpoints.mapping import TensorRule
from snella_jax.models.checkpoints.torch_rules import affine, convolution, linear, root

MARK = r"image_encoder\.patch_embed\.seq\.0\.c\.weight"
BATCH_NORM_EPS = 1e-5
_NORM = r"(.*)\.bn\.(weight|bias|running_mean|running_var|num_batches_tracked)"
_STAGE = r"image_encoder\.layers\.(\d+)\."
_BLOCK = _STAGE + r"blocks\.(\d+)\."
_PLACE = "encoder/blocks/{0}/{1}/"

RULES = [
    *convolution(r"image_encoder\.patch_embed\.seq\.0\.c", "encoder/patch_embed/conv1"),
    *convolution(r"image_encoder\.patch_embed\.seq\.2\.c", "encoder/patch_embed/conv2"),
    *convolution(_BLOCK + r"(conv[123]|local_conv)\.c", _PLACE + "{2}"),
    *affine(_BLOCK + r"attn\.norm", _PLACE + "norm1"),
    *linear(_BLOCK + r"attn\.proj", _PLACE + "attn/proj"),
    TensorRule(_BLOCK + r"attn\.attention_biases", (_PLACE + "attn/bias_table",)),
    TensorRule(_BLOCK + r"attn\.attention_bias_idxs"),
    *affine(_BLOCK + r"mlp\.norm", _PLACE + "norm2"),
    *linear(_BLOCK + r"mlp\.(fc[12])", _PLACE + "mlp/{2}"),
    *convolution(_STAGE + r"downsample\.(conv[123])\.c", "encoder/down/{0}/{1}"),
    *convolution(r"image_encoder\.neck\.0", "encoder/neck/conv1"),
    *affine(r"image_encoder\.neck\.1", "encoder/neck/norm1"),
    *convolution(r"image_encoder\.neck\.2", "encoder/neck/conv2"),
    *affine(r"image_encoder\.neck\.3", "encoder/neck/norm2"),
    TensorRule(r"image_encoder\.(norm_)?head\.(weight|bias)"),  # of pre-training
]


def rules(tensors: Mapping[str, Stored]) -> list[TensorRule]:
    """Returns the rules for the image encoder's tensors, batch norms folded.

    Those of `qkv` depend on the stage's number of heads, which the tables of biases
    say.
    """
    found = [*RULES]
    for name, table in tensors.items():
        match = re.fullmatch(_BLOCK + r"attn\.attention_biases", name)
        if match and match[2] == "0" and table.shape:
            found += _fused(match[1], table.shape[0])
    return found


def _fused(stage: str, heads: int) -> list[TensorRule]:
    block = rf"image_encoder\.layers\.({stage})\.blocks\.(\d+)\.attn\.qkv\."
    return [
        TensorRule(
            block + theirs,
            tuple(f"{_PLACE}attn/{name}/{ours}" for name in "qkv"),
            head_by_head(heads),
        )
        for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
    ]


def head_by_head(heads: int) -> Callable[[np.ndarray], Sequence[np.ndarray]]:
    """Returns what splits a fused `[3 * D]` or `[3 * D, D]` whose rows go head by head.

    Inside each head stand the rows of its query, its key and its value.

    >>> [part.tolist() for part in head_by_head(2)(np.arange(12))]
    [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    """

    def split(tensor: np.ndarray) -> Sequence[np.ndarray]:
        rows = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
        return [rows[:, i].reshape(-1, *tensor.shape[1:]).T for i in range(3)]

    return split


def folded(
    tensors: Mapping[str, Stored],
) -> tuple[dict[str, Stored], list[str]]:
    """Folds batch norms into the convolutions before them, computed in float64.

    `c.weight`, `bn.weight` and so on become `c.weight` and `c.bias`, of the
    convolution's dtype.

    Returns:
      Tensors by name, and what is missing or does not fit, in words.
    """
    found = {
        name: tensor
        for name, tensor in tensors.items()
        if not re.fullmatch(_NORM, name)
    }
    problems: list[str] = []
    modules = {match[1] for name in tensors if (match := re.fullmatch(_NORM, name))}
    for module in sorted(modules):
        try:
            weight, bias = _fold(tensors, module)
        except KeyError as missing:
            problems.append(f"{missing.args[0]}: there is no tensor for it")
        except (ValueError, TypeError, IndexError) as error:
            problems.append(f"{module}.bn: {error}")
        else:
            found |= {f"{module}.c.weight": weight, f"{module}.c.bias": bias}
    return found, problems


def _fold(tensors: Mapping[str, Stored], module: str) -> tuple[np.ndarray, np.ndarray]:
    def numbers(name: str) -> np.ndarray:
        return np.asarray(tensors[f"{module}.{name}"], np.float64)

    names = "weight", "bias", "running_mean", "running_var"
    scale, bias, mean, variance = (numbers(f"bn.{name}") for name in names)
    if not np.all(variance >= 0):
        raise ValueError("running_var has numbers that are not positive")
    kernel, dtype = numbers("c.weight"), tensors[f"{module}.c.weight"].dtype
    shapes = {array.shape for array in (scale, bias, mean, variance)}
    if shapes != {kernel.shape[:1]}:
        raise ValueError(f"shapes {shapes}, behind a convolution {kernel.shape}")
    scale = scale / np.sqrt(variance + BATCH_NORM_EPS)
    kernel = kernel * scale.reshape(-1, *(1,) * (kernel.ndim - 1))
    return kernel.astype(dtype), (bias - mean * scale).astype(dtype)


def fields(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the shapes of the encoder's parts as fields of `TinyViTConfig`.

    Raises:
      KeyError: there is no part that it needs.
      ValueError, IndexError: shapes that no TinyViT has.
    """
    stages = range(4)
    blocks = (re.match(r"encoder/blocks/(\d+)/(\d+)/", path) for path in parts)
    pairs = {match.groups() for match in blocks if match}
    first = parts["encoder/blocks/0/0/conv1/kernel"].shape
    tables = [parts[f"encoder/blocks/{i}/0/attn/bias_table"].shape for i in stages[1:]]
    fc1s = [parts[f"encoder/blocks/{i}/0/mlp/fc1/kernel"].shape for i in stages[1:]]
    widths = [first[2], *(shape[0] for shape in fc1s)]
    return {
        "widths": tuple(widths),
        # Counted, not the largest: a number that leaves a gap has no place.
        "depths": tuple(sum(stage == str(i) for stage, _ in pairs) for i in stages),
        "heads": tuple(shape[0] for shape in tables),
        "windows": tuple(root(shape[1]) for shape in tables),
        "mlp_ratio": fc1s[0][1] / fc1s[0][0],
        "expansion": first[3] / first[2],
        "out_channels": parts["encoder/neck/conv1/kernel"].shape[3],
        "channels": parts["encoder/patch_embed/conv1/kernel"].shape[2],
    }
