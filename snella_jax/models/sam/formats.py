"""Published formats of SAM's weights: where their tensors go.

| format | examples |
|---|---|
| Meta's `.pth` | `sam_vit_b_01ec64.pth`, `sam_vit_l_0b3195.pth` |
| Hugging Face folder | `SamModel`, such as `facebook/sam-vit-base` |

Both have the same tensors by other names. The trap is an MLP's `layers.0`: the first
layer in Meta's names, the second in transformers'.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from snella_jax.files.arrays import Stored
from snella_jax.models.checkpoints.mapping import TensorRule
from snella_jax.models.sam.config import SamConfig

Form = Literal["hugging_face", "meta"]
MATRIX = "prompts/position_matrix"
TIED = "prompt_encoder.shared_embedding.positional_embedding"  # a copy in some folders


@dataclass(frozen=True)
class Move:
    """How a tensor's numbers are moved: to our arrays, and back."""

    there: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    back: Callable[..., np.ndarray]


def _axes(*there: int) -> Move:
    """Moves by a permutation of axes; our axis `i` is the tensor's `there[i]`."""
    back = tuple(np.argsort(there))
    return Move(lambda x: (x.transpose(there),), lambda part: part.transpose(back))


SAME = Move(lambda x: (x,), lambda part: part)
LINEAR = _axes(1, 0)  # [out, in]
CONVOLUTION = _axes(2, 3, 1, 0)  # [out, in, height, width]
UPSCALING = _axes(0, 2, 3, 1)  # [in, out, height, width]
VECTOR = Move(lambda x: (_only_row(x),), lambda part: part[None])  # [1, C]
QKV = Move(  # [3 * out, in]: q, k, v
    lambda x: tuple(part.T for part in np.split(x, 3)),
    lambda *parts: np.concatenate([part.T for part in parts]),
)


def _only_row(tensor: np.ndarray) -> np.ndarray:
    if tensor.ndim != 2 or len(tensor) != 1:
        raise ValueError("expected one row")
    return tensor[0]


@dataclass(frozen=True)
class Row:
    """Names of a tensor, which may have a number `{0}` in them, and its places."""

    places: tuple[str, ...]
    hugging_face: str
    meta: str
    move: Move = SAME

    def rule(self, form: Form) -> TensorRule:
        """Returns the rule that reads the tensor."""
        return TensorRule(_numbered(getattr(self, form)), self.places, self.move.there)


Names = tuple[str, str]  # in transformers, in Meta's files


def _layer(path: str, names: Names, move: Move = LINEAR) -> list[Row]:
    """Returns the rows of a layer's kernel and bias."""
    first, second = names
    return [
        _kernel(path, names, move),
        Row((f"{path}/bias",), f"{first}.bias", f"{second}.bias"),
    ]


def _kernel(path: str, names: Names, move: Move) -> Row:
    first, second = names
    return Row((f"{path}/kernel",), f"{first}.weight", f"{second}.weight", move)


def _norm(path: str, names: Names) -> list[Row]:
    first, second = names
    return [
        Row((f"{path}/scale",), f"{first}.weight", f"{second}.weight"),
        Row((f"{path}/bias",), f"{first}.bias", f"{second}.bias"),
    ]


def _same(path: str, name: str, move: Move = SAME) -> Row:
    """Returns the row of a tensor of the same name in both formats."""
    return Row((path,), name, name, move)


def _attention(path: str, name: str) -> list[Row]:
    rows = []
    for ours in ("q", "k", "v", "out"):
        theirs = f"{name}.{ours}_proj"
        rows += _layer(f"{path}/{ours}", (theirs, theirs))
    return rows


def _head(path: str, name: str) -> list[Row]:
    """Returns the rows of an MLP of three layers, with other names for all of them."""
    rows = []
    for index, theirs in enumerate(("proj_in", "layers.0", "proj_out")):
        names = f"{name}.{theirs}", f"{name}.layers.{index}"
        rows += _layer(f"{path}/fc{index + 1}", names)
    return rows


def _encoder() -> Iterable[Row]:
    first, second = "vision_encoder.", "image_encoder."
    yield Row(("encoder/pos_embed",), f"{first}pos_embed", f"{second}pos_embed")
    names = f"{first}patch_embed.projection", f"{second}patch_embed.proj"
    yield from _layer("encoder/patch_embed", names, CONVOLUTION)
    neck = "encoder/neck/"
    for i in (1, 2):
        names = f"{first}neck.conv{i}", f"{second}neck.{2 * i - 2}"
        yield _kernel(f"{neck}conv{i}", names, CONVOLUTION)
        names = f"{first}neck.layer_norm{i}", f"{second}neck.{2 * i - 1}"
        yield from _norm(f"{neck}norm{i}", names)
    first, second = f"{first}layers.{{0}}.", f"{second}blocks.{{0}}."
    block = "encoder/blocks/{0}/"
    for i in (1, 2):
        names = f"{first}layer_norm{i}", f"{second}norm{i}"
        yield from _norm(f"{block}norm{i}", names)
        names = f"{first}mlp.lin{i}", f"{second}mlp.lin{i}"
        yield from _layer(f"{block}mlp/fc{i}", names)
    names = f"{first}attn.proj", f"{second}attn.proj"
    yield from _layer(f"{block}attn/proj", names)
    for kind, ours in (("weight", "kernel"), ("bias", "bias")):
        places = tuple(f"{block}attn/{name}/{ours}" for name in "qkv")
        fused = f"attn.qkv.{kind}"
        yield Row(places, f"{first}{fused}", f"{second}{fused}", QKV)
    for table in ("attn.rel_pos_h", "attn.rel_pos_w"):
        path = block + table.replace(".", "/")
        yield Row((path,), f"{first}{table}", f"{second}{table}")


def _prompts() -> Iterable[Row]:
    ours, theirs = "prompts/", "prompt_encoder."
    yield Row(
        (MATRIX,),
        "shared_image_embedding.positional_embedding",
        f"{theirs}pe_layer.positional_encoding_gaussian_matrix",
    )
    yield Row(
        ("prompts/points/{0}/embedding",),
        "prompt_encoder.point_embed.{0}.weight",
        "prompt_encoder.point_embeddings.{0}.weight",
        VECTOR,
    )
    yield _same(f"{ours}not_a_point", f"{theirs}not_a_point_embed.weight", VECTOR)
    yield _same(f"{ours}no_mask_embed", f"{theirs}no_mask_embed.weight", VECTOR)
    first, second = f"{theirs}mask_embed.", f"{theirs}mask_downscaling."
    for i in (1, 2, 3):
        names = f"{first}conv{i}", f"{second}{3 * i - 3}"
        yield from _layer(f"{ours}mask/conv{i}", names, CONVOLUTION)
    for i in (1, 2):
        names = f"{first}layer_norm{i}", f"{second}{3 * i - 2}"
        yield from _norm(f"{ours}mask/norm{i}", names)


def _decoder() -> Iterable[Row]:
    ours, theirs = "decoder/", "mask_decoder."
    for name in ("iou_token", "mask_tokens"):
        yield _same(f"{ours}{name}", f"{theirs}{name}.weight")
    yield from _head(f"{ours}iou", f"{theirs}iou_prediction_head")
    yield from _head("decoder/hyper/{0}", "mask_decoder.output_hypernetworks_mlps.{0}")
    for i in (1, 2):
        names = f"{theirs}upscale_conv{i}", f"{theirs}output_upscaling.{3 * i - 3}"
        yield from _layer(f"{ours}upscale{i}", names, UPSCALING)
    names = f"{theirs}upscale_layer_norm", f"{theirs}output_upscaling.1"
    yield from _norm(f"{ours}upscale_norm", names)
    theirs += "transformer."
    yield from _attention(f"{ours}final_attn", f"{theirs}final_attn_token_to_image")
    names = f"{theirs}layer_norm_final_attn", f"{theirs}norm_final_attn"
    yield from _norm(f"{ours}final_norm", names)
    ours, theirs = ours + "layers/{0}/", theirs + "layers.{0}."
    yield from _attention(f"{ours}self_attn", f"{theirs}self_attn")
    yield from _attention(f"{ours}to_image", f"{theirs}cross_attn_token_to_image")
    yield from _attention(f"{ours}to_tokens", f"{theirs}cross_attn_image_to_token")
    for i in (1, 2):
        name = f"{theirs}mlp.lin{i}"
        yield from _layer(f"{ours}mlp/fc{i}", (name, name))
    for i in (1, 2, 3, 4):
        names = f"{theirs}layer_norm{i}", f"{theirs}norm{i}"
        yield from _norm(f"{ours}norm{i}", names)


ENCODER = [*_encoder()]
REST = [*_prompts(), *_decoder()]  # the same for every image encoder
# What every format has a tensor of: the decoder's first norm.
MARKS = (r"mask_decoder\.transformer\.layers\.0\.(?:layer_)?norm1\.weight",)


def rules(form: Form, rows: Iterable[Row] = (*ENCODER, *REST)) -> list[TensorRule]:
    """Returns the rules for the tensors of a format."""
    return [row.rule(form) for row in rows]


def hugging_face(parts: Mapping[str, np.ndarray]) -> dict[str, Stored]:
    """Returns a model's tensors by their names in a `SamModel`.

    >>> [*hugging_face({"encoder/blocks/3/norm1/scale": np.ones(2)})]
    ['vision_encoder.layers.3.layer_norm1.weight']

    Args:
      parts: arrays by the paths that the rules give them.
    """
    return _named(parts, (*ENCODER, *REST), "hugging_face")


def meta_rest(parts: Mapping[str, np.ndarray]) -> dict[str, Stored]:
    """Returns the tensors of prompt encoder and decoder by Meta's names."""
    return _named(parts, REST, "meta")


def _named(
    parts: Mapping[str, np.ndarray], rows: Iterable[Row], form: Form
) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for row in rows:
        first = re.compile(_numbered(row.places[0]))
        for match in filter(None, map(first.fullmatch, parts)):
            own = [parts[path.format(*match.groups())] for path in row.places]
            name = getattr(row, form).format(*match.groups())
            tensors[name] = row.move.back(*own)
    return tensors


def stacked(config: SamConfig) -> str:
    """Returns the regex of the modules whose variables have a leading axis."""
    kinds = r"encoder/blocks/(?:windowed|whole|\d+)|" if config.stacked else ""
    return f"{kinds}prompts/points"


def _numbered(name: str) -> str:
    return re.escape(name).replace(r"\{0\}", r"(\d+)")
