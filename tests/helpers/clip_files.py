"""Files of CLIP's towers in the published formats, from our models' numbers."""

import json

import clip_oracle
import numpy as np
import script_archive
from safetensors.numpy import save_file

BLOCK = {"norm1": "layer_norm1", "norm2": "layer_norm2",
         "attn/out": "self_attn.out_proj",
         **{f"attn/{x}": f"self_attn.{x}_proj" for x in "qkv"},
         "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}  # fmt: skip
OPENAI_BLOCK = {"norm1": "ln_1", "norm2": "ln_2", "attn/out": "attn.out_proj",
                "mlp/fc1": "mlp.c_fc", "mlp/fc2": "mlp.c_proj"}  # fmt: skip
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def numbers(model):
    """Returns float32 arrays by path, those of stacked blocks as `blocks/3/...`."""
    found = {}
    for path, array in clip_oracle.parameters(model).items():
        array = array.astype(np.float32)
        if path.startswith("blocks/"):
            rest = path.removeprefix("blocks/")
            found |= {f"blocks/{i}/{rest}": row for i, row in enumerate(array)}
        else:
            found[path] = array
    return found


def transformers(model, image=False):
    """Returns tensors by their names in a `CLIPModel`."""
    start = "vision_model." if image else "text_model."
    top = {"embed/embedding": start + "embeddings.token_embedding.weight",
           "pos_embed": start + "embeddings.position_embedding.weight",
           "cls_token": start + "embeddings.class_embedding",
           "patch_embed/kernel": start + "embeddings.patch_embedding.weight",
           "pre_norm": start + "pre_layrnorm",
           "norm": start + ("post_layernorm" if image else "final_layer_norm"),
           "projection/kernel": ("visual" if image else "text") + "_projection.weight",
           }  # fmt: skip
    found = {}
    for path, array in numbers(model).items():
        name = top.get(path)
        if name is None:
            layer, leaf = path.rsplit("/", 1)
            if path.startswith("blocks/"):
                _, index, layer = layer.split("/", 2)
                name = f"{start}encoder.layers.{index}.{BLOCK[layer]}.{LEAVES[leaf]}"
            else:
                name = f"{top[layer]}.{LEAVES[leaf]}"
        found[name] = _torch(path, array)
    return found


def openai(text, image):
    """Returns tensors by their names in OpenAI's archives."""
    top = {"embed/embedding": "token_embedding.weight",
           "pos_embed": "positional_embedding", "cls_token": "class_embedding",
           "patch_embed/kernel": "conv1.weight", "pre_norm": "ln_pre"}  # fmt: skip
    own = {"norm": "ln_final", "projection/kernel": "text_projection"}
    of_image = {"norm": "ln_post", "projection/kernel": "proj"}
    found = {"logit_scale": np.float32(4.6), "context_length": np.int64(7),
             "input_resolution": np.int64(4), "vocab_size": np.int64(50)}  # fmt: skip
    for model, start, extra in ((text, "", own), (image, "visual.", of_image)):
        names, fused = top | extra, {}
        for path, array in numbers(model).items():
            name = names.get(path)
            if name is None:
                layer, leaf = path.rsplit("/", 1)
                if path.startswith("blocks/"):
                    _, index, layer = layer.split("/", 2)
                    block = f"{start}transformer.resblocks.{index}."
                    if layer in ("attn/q", "attn/k", "attn/v"):
                        key = f"{block}attn.in_proj_{LEAVES[leaf]}"
                        fused.setdefault(key, {})[layer[-1]] = _torch(path, array)
                        continue
                    found[f"{block}{OPENAI_BLOCK[layer]}.{LEAVES[leaf]}"] = _torch(
                        path, array
                    )
                    continue
                name = f"{names[layer]}.{LEAVES[leaf]}"
            straight = path == "projection/kernel"  # (in, out), as ours
            found[start + name] = array if straight else _torch(path, array)
        for name, parts in fused.items():
            found[name] = np.concatenate([parts[x] for x in "qkv"])
        if not start:
            found["transformer.resblocks.0.attn_mask"] = np.zeros((7, 7), np.float32)
    return {name: np.asarray(array) for name, array in found.items()}


def text_config(config):
    return {
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.positions,
        "projection_dim": config.projection,
        "hidden_act": config.activation,
        "eos_token_id": 2 if config.eos is None else config.eos,
    }


def image_config(config):
    return {
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "image_size": list(config.image_hw),
        "patch_size": config.patch_hw[0],
        "hidden_act": config.activation,
    }


def folder(path, tensors, config, **files):
    """Writes a folder of transformers."""
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    for name, said in {"config": config, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(said), "utf-8")
    return path


def archive(path, text, image):
    return script_archive.write(path, openai(text, image), training=False)


def _torch(path, array):
    if path.endswith("kernel"):
        array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
    return np.ascontiguousarray(array)
