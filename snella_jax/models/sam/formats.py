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


def _layer(
    path: str, hugging_face: str, meta: str, move: Move = LINEAR, *, bias: bool = True
) -> list[Row]:
    """Returns the rows of a layer with a kernel, and perhaps a bias."""
    names = hugging_face, meta
    rows = [Row((f"{path}/kernel",), *(f"{name}.weight" for name in names), move)]
    if bias:
        rows.append(Row((f"{path}/bias",), *(f"{name}.bias" for name in names)))
    return rows


def _norm(path: str, hugging_face: str, meta: str) -> list[Row]:
    return [
        Row((f"{path}/{ours}",), f"{hugging_face}.{theirs}", f"{meta}.{theirs}")
        for ours, theirs in (("scale", "weight"), ("bias", "bias"))
    ]


def _same(path: str, name: str, move: Move = SAME) -> Row:
    """Returns the row of a tensor of the same name in both formats."""
    return Row((path,), name, name, move)


def _attention(path: str, name: str) -> list[Row]:
    return [
        row
        for ours in ("q", "k", "v", "out")
        for row in _layer(f"{path}/{ours}", *(f"{name}.{ours}_proj",) * 2)
    ]


def _head(path: str, name: str) -> list[Row]:
    """Returns the rows of an MLP of three layers, of which only the second is alike."""
    numbered = enumerate(("proj_in", "layers.0", "proj_out"))
    return [
        row
        for index, theirs in numbered
        for row in _layer(
            f"{path}/fc{index + 1}", f"{name}.{theirs}", f"{name}.layers.{index}"
        )
    ]


def _encoder() -> Iterable[Row]:
    theirs, metas = "vision_encoder.", "image_encoder."
    yield Row(("encoder/pos_embed",), f"{theirs}pos_embed", f"{metas}pos_embed")
    yield from _layer(
        "encoder/patch_embed",
        f"{theirs}patch_embed.projection",
        f"{metas}patch_embed.proj",
        CONVOLUTION,
    )
    ours, layer, block = "encoder/blocks/{0}/", theirs + "layers.{0}.", metas
    block += "blocks.{0}."
    for i in (1, 2):
        yield from _norm(f"{ours}norm{i}", f"{layer}layer_norm{i}", f"{block}norm{i}")
        yield from _layer(
            f"{ours}mlp/fc{i}", f"{layer}mlp.lin{i}", f"{block}mlp.lin{i}"
        )
    for ending, part in (("weight", "kernel"), ("bias", "bias")):
        places = tuple(f"{ours}attn/{name}/{part}" for name in "qkv")
        fused = f"attn.qkv.{ending}"
        yield Row(places, f"{layer}{fused}", f"{block}{fused}", QKV)
    yield from _layer(f"{ours}attn/proj", f"{layer}attn.proj", f"{block}attn.proj")
    for axis in ("rel_pos_h", "rel_pos_w"):
        name = f"attn.{axis}"
        yield Row((f"{ours}attn/{axis}",), f"{layer}{name}", f"{block}{name}")
    ours, neck, metas = "encoder/neck/", f"{theirs}neck.", f"{metas}neck."
    for i in (1, 2):
        names = f"{ours}conv{i}", f"{neck}conv{i}", f"{metas}{2 * i - 2}"
        yield from _layer(*names, CONVOLUTION, bias=False)
        yield from _norm(
            f"{ours}norm{i}", f"{neck}layer_norm{i}", f"{metas}{2 * i - 1}"
        )


def _prompts() -> Iterable[Row]:
    theirs, ours = "prompt_encoder.", "prompts/"
    yield Row(
        (MATRIX,),
        "shared_image_embedding.positional_embedding",
        f"{theirs}pe_layer.positional_encoding_gaussian_matrix",
    )
    yield Row(
        ("prompts/points/{0}/embedding",),
        theirs + "point_embed.{0}.weight",
        theirs + "point_embeddings.{0}.weight",
        VECTOR,
    )
    yield _same(f"{ours}not_a_point", f"{theirs}not_a_point_embed.weight", VECTOR)
    yield _same(f"{ours}no_mask_embed", f"{theirs}no_mask_embed.weight", VECTOR)
    mask, metas = f"{theirs}mask_embed.", f"{theirs}mask_downscaling."
    for i in (1, 2, 3):
        names = f"{ours}mask/conv{i}", f"{mask}conv{i}", f"{metas}{3 * i - 3}"
        yield from _layer(*names, CONVOLUTION)
    for i in (1, 2):
        names = f"{ours}mask/norm{i}", f"{mask}layer_norm{i}", f"{metas}{3 * i - 2}"
        yield from _norm(*names)


def _decoder() -> Iterable[Row]:
    theirs, ours = "mask_decoder.", "decoder/"
    for name in ("iou_token", "mask_tokens"):
        yield _same(f"{ours}{name}", f"{theirs}{name}.weight")
    path, name = ours + "layers/{0}/", theirs + "transformer.layers.{0}."
    yield from _attention(f"{path}self_attn", f"{name}self_attn")
    yield from _attention(f"{path}to_image", f"{name}cross_attn_token_to_image")
    yield from _attention(f"{path}to_tokens", f"{name}cross_attn_image_to_token")
    for i in (1, 2):
        yield from _layer(f"{path}mlp/fc{i}", *(f"{name}mlp.lin{i}",) * 2)
    for i in (1, 2, 3, 4):
        yield from _norm(f"{path}norm{i}", f"{name}layer_norm{i}", f"{name}norm{i}")
    final = f"{theirs}transformer."
    yield from _attention(f"{ours}final_attn", f"{final}final_attn_token_to_image")
    names = f"{final}layer_norm_final_attn", f"{final}norm_final_attn"
    yield from _norm(f"{ours}final_norm", *names)
    upscaling = f"{theirs}output_upscaling."
    for i in (1, 2):
        names = f"{theirs}upscale_conv{i}", f"{upscaling}{3 * i - 3}"
        yield from _layer(f"{ours}upscale{i}", *names, UPSCALING)
    names = f"{theirs}upscale_layer_norm", f"{upscaling}1"
    yield from _norm(f"{ours}upscale_norm", *names)
    yield from _head(ours + "hyper/{0}", theirs + "output_hypernetworks_mlps.{0}")
    yield from _head(f"{ours}iou", f"{theirs}iou_prediction_head")


ENCODER = [*_encoder()]
REST = [*_prompts(), *_decoder()]  # the same for every image encoder
# What every format has a tensor of: the decoder's first norm.
MARKS = (r"mask_decoder\.transformer\.layers\.0\.(?:layer_)?norm1\.weight",)


def rules(form: Form, rows: Iterable[Row] = (*ENCODER, *REST)) -> list[TensorRule]:
    """Returns the rules for the tensors of a format."""
    return [row.rule(form) for row in rows]


def hugging_face(parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a model's tensors by their names in a `SamModel`.

    >>> [*hugging_face({"encoder/blocks/3/norm1/scale": np.ones(2)})]
    ['vision_encoder.layers.3.layer_norm1.weight']

    Args:
      parts: arrays by the paths that the rules give them.
    """
    tensors = {}
    for row in (*ENCODER, *REST):
        first = re.compile(_numbered(row.places[0]))
        for match in filter(None, map(first.fullmatch, parts)):
            own = [parts[path.format(*match.groups())] for path in row.places]
            name = row.hugging_face.format(*match.groups())
            tensors[name] = row.move.back(*own)
    return tensors


def stacked(config: SamConfig) -> str:
    """Returns the regex of the modules whose variables have a leading axis."""
    kinds = r"encoder/blocks/(?:windowed|whole|\d+)|" if config.stacked else ""
    return f"{kinds}prompts/points"


def _numbered(name: str) -> str:
    return re.escape(name).replace(r"\{0\}", r"(\d+)")
