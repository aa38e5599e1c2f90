"""Published formats of CLIP's weights: where their tensors go.

| format | examples |
|---|---|
| transformers | `CLIPModel`, `CLIPTextModelWithProjection`, `CLIPVisionModel` |
| transformers' names in a file | Stable Diffusion 3's `clip_l`, `clip_g` |
| OpenAI | the TorchScript archives `ViT-B-32.pt`, `ViT-L-14.pt` |
"""

import re
from typing import Literal

from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.mapping import TensorRule
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.checkpoints.torch_rules import (
    affine,
    convolution,
    linear,
    thirds,
    transposed,
)

Tower = Literal["text", "image"]
Format = Literal["transformers", "openai"]
FORMATS: tuple[Format, ...] = ("transformers", "openai")
OPENAI = "input_resolution"  # tensor of OpenAI's archives alone

# Tensors that a tower has in each format. OpenAI's, which end the other's names, come
# last.
MARKS: dict[Tower, dict[Format, str]] = {
    "text": {
        "transformers": r"embeddings\.token_embedding\.weight",
        "openai": r"token_embedding\.weight",
    },
    "image": {
        "transformers": r"embeddings\.patch_embedding\.weight",
        "openai": r"visual\.conv1\.weight",
    },
}
NAMES: dict[Tower, str] = {"text": "tower of texts", "image": "tower of images"}
LOADERS: dict[Tower, str] = {"text": "clip.load", "image": "clip.load_image"}
OTHER: dict[Tower, Tower] = {"text": "image", "image": "text"}
FOREIGN = {  # what has names like these
    r"(.*\.)?(logit_bias|(text|vision)_model\.head\..*)": "a SigLIP",
    r"(.*\.)?(text_model\.embeddings\.word_embeddings\.weight|bert\..*)": (
        "a Chinese-CLIP or AltCLIP"
    ),
    r"(.*\.)?visual\.(layer1|trunk)\..*": "a CLIP without a ViT",
}

_BLOCK = r"encoder\.layers\.(\d+)\."
_TRANSFORMERS = [
    *affine(_BLOCK + "layer_norm1", "blocks/{0}/norm1"),
    *affine(_BLOCK + "layer_norm2", "blocks/{0}/norm2"),
    *linear(_BLOCK + r"self_attn\.([qkv])_proj", "blocks/{0}/attn/{1}"),
    *linear(_BLOCK + r"self_attn\.out_proj", "blocks/{0}/attn/out"),
    *linear(_BLOCK + r"mlp\.(fc[12])", "blocks/{0}/mlp/{1}"),
    TensorRule(r"embeddings\.position_embedding\.weight", ("pos_embed",)),
    TensorRule(r"embeddings\.position_ids"),
]


def _resblocks(prefix: str) -> list[TensorRule]:
    """Returns the rules for OpenAI's blocks."""
    block = prefix + r"transformer\.resblocks\.(\d+)\."
    return [
        *affine(block + "ln_1", "blocks/{0}/norm1"),
        *affine(block + "ln_2", "blocks/{0}/norm2"),
        *(
            TensorRule(
                block + f"attn\\.in_proj_{theirs}",
                tuple(f"blocks/{{0}}/attn/{name}/{ours}" for name in "qkv"),
                thirds,
            )
            for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
        ),
        *linear(block + r"attn\.out_proj", "blocks/{0}/attn/out"),
        *linear(block + r"mlp\.c_fc", "blocks/{0}/mlp/fc1"),
        *linear(block + r"mlp\.c_proj", "blocks/{0}/mlp/fc2"),
        TensorRule(block + "attn_mask"),
    ]


RULES: dict[Tower, dict[Format, list[TensorRule]]] = {
    "text": {
        "transformers": [
            TensorRule(r"embeddings\.token_embedding\.weight", ("embed/embedding",)),
            *_TRANSFORMERS,
            *affine("final_layer_norm", "norm"),
            TensorRule(r"text_projection\.weight", ("projection/kernel",), transposed),
            TensorRule(r"vision_model\..*|visual_projection\.weight|logit_scale"),
        ],
        "openai": [
            TensorRule(r"token_embedding\.weight", ("embed/embedding",)),
            TensorRule("positional_embedding", ("pos_embed",)),
            *_resblocks(""),
            *affine("ln_final", "norm"),
            TensorRule("text_projection", ("projection/kernel",)),
            TensorRule(r"visual\..*"),
            TensorRule("logit_scale|input_resolution|context_length|vocab_size"),
        ],
    },
    "image": {
        "transformers": [
            *convolution(r"embeddings\.patch_embedding", "patch_embed"),
            TensorRule(r"embeddings\.class_embedding", ("cls_token",)),
            *_TRANSFORMERS,
            *affine("pre_layrnorm", "pre_norm"),
            *affine("post_layernorm", "norm"),
            TensorRule(
                r"visual_projection\.weight", ("projection/kernel",), transposed
            ),
            TensorRule(r"text_model\..*|text_projection\.weight|logit_scale"),
        ],
        "openai": [
            *convolution(r"visual\.conv1", "patch_embed"),
            TensorRule(r"visual\.class_embedding", ("cls_token",)),
            TensorRule(r"visual\.positional_embedding", ("pos_embed",)),
            *_resblocks(r"visual\."),
            *affine(r"visual\.ln_pre", "pre_norm"),
            *affine(r"visual\.ln_post", "norm"),
            TensorRule(r"visual\.proj", ("projection/kernel",)),
            TensorRule(r"(?!visual\.).*"),  # the tower of texts
        ],
    },
}


def recognised(checkpoint: Checkpoint, tower: Tower) -> tuple[Checkpoint, Format]:
    """Returns the tensors without a prefix, and their format.

    Raises:
      CheckpointError: it holds another architecture, or the other tower alone.
    """
    names = checkpoint.tensors.keys()
    for pattern, what in FOREIGN.items():
        if found := next((n for n in names if re.fullmatch(pattern, n)), None):
            raise CheckpointError(
                checkpoint.path, f"it holds {what}, no CLIP with a ViT: {found}"
            )
    for form in FORMATS:
        mark = MARKS[tower][form]
        if checkpoint.prefixes(mark):
            return checkpoint.unwrapped(mark), form
    other = OTHER[tower]
    if checkpoint.prefixes(*MARKS[other].values()):
        raise CheckpointError(
            checkpoint.path,
            f"it holds CLIP's {NAMES[other]} alone: {LOADERS[other]} loads it",
        )
    some = ", ".join(sorted(names)[:5])
    raise CheckpointError(
        checkpoint.path,
        f"no {NAMES[tower]} of a CLIP: expected the names of transformers or OpenAI, "
        f"found {some} ({len(names)} in all)",
    )
