"""Makes the files beside it: `pip install -e ".[test,reference]"`, `python make.py`.

A Swin and a ConvNeXt of transformers with random weights, on images of an odd size
(patches, windows and merging do not divide it): their folders, the same weights in the
original formats (`.pth`), and the grid after every stage, what the head sees and the
logits (`expected.npz`).
"""

import collections
import re
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
SIZE = (50, 38)
LABELS = {i: f"LABEL_{i}" for i in range(3)}
SWIN = {
    "embed_dim": 4,
    "depths": [2, 4, 2],
    "num_heads": [1, 2, 4],
    "window_size": 3,
    "image_size": list(SIZE),
}
CONVNEXT = {
    "num_stages": 3,
    "depths": [1, 3, 2],
    "hidden_sizes": [4, 6, 8],
    "image_size": list(SIZE),
}
SWIN_NAMES = [
    ("swin.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("swin.embeddings.norm", "patch_embed.norm"),
    ("swin.encoder.", ""),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("attention.output.dense", "attn.proj"),
    ("attention.self", "attn"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("swin.layernorm", "norm"),
    ("classifier", "head"),
]
CONVNEXT_NAMES = [
    ("convnext.embeddings.patch_embeddings", "downsample_layers.0.0"),
    ("convnext.embeddings.layernorm", "downsample_layers.0.1"),
    (r"convnext.encoder.stages.(\d+).downsampling_layer", r"downsample_layers.\1"),
    (r"convnext.encoder.stages.(\d+).layers", r"stages.\1"),
    ("layer_scale_parameter", "gamma"),
    ("convnext.layernorm", "norm"),
    ("layernorm", "norm"),
    ("classifier", "head"),
]


def randomised(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def renamed(state, names):
    out = collections.OrderedDict()
    for name, tensor in state.items():
        for theirs, ours in names:
            name = re.sub(theirs, ours, name)
        out[name] = tensor
    return out


def fused(state):
    """Query, key and value as one `qkv`; and the buffers that the original saves."""
    out = collections.OrderedDict()
    for name, tensor in state.items():
        if ".query." in name:
            parts = [state[name.replace("query", part)] for part in QKV]
            out[name.replace("query", "qkv")] = torch.cat(parts)
        elif not re.search(r"\.(key|value)\.", name):
            out[name] = tensor
        if name.endswith("bias_table"):
            out[name.replace("bias_table", "index")] = torch.zeros(9, 9).long()
            if ".blocks.1." in name:
                mask = name.replace("attn.relative_position_bias_table", "attn_mask")
                out[mask] = torch.zeros(4, 9, 9)
    return out


QKV = "query", "key", "value"


def swin_stages(model, images):
    """The grid after the blocks of every stage, before merging."""
    grid, size = model.swin.embeddings(images)
    found = []
    for stage in model.swin.encoder.layers:
        how = {"output_hidden_states_before_downsampling": True}
        grid, before, _ = stage(grid, size, **how)
        found.append(before)
        size = tuple((side + 1) // 2 for side in size)
    return found


def convnext_stages(model, images):
    return model(images, output_hidden_states=True).hidden_states[-3:]


def main(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    images = torch.randn(2, 3, *SIZE)
    expected = {"images": images.permute(0, 2, 3, 1)}
    swin = transformers.SwinForImageClassification(
        transformers.SwinConfig(**SWIN, id2label=LABELS)
    )
    convnext = transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(**CONVNEXT, id2label=LABELS)
    )
    for name, model, names, stages in (
        ("swin", swin, SWIN_NAMES, swin_stages),
        ("convnext", convnext, CONVNEXT_NAMES, convnext_stages),
    ):
        randomised(model).save_pretrained(folder / name)
        state = transformers_names(folder / name)
        original = renamed(state, names)
        torch.save({"model": fused(original)}, folder / f"{name}.pth")
        with torch.no_grad():
            for index, grid in enumerate(stages(model, images)):
                expected[f"{name}/stage_{index}"] = grid.permute(0, 2, 3, 1)
            base = getattr(model, name)
            expected[f"{name}/pooled"] = base(images).pooler_output
            expected[f"{name}/logits"] = model(images).logits
    numbers = {name: np.asarray(tensor) for name, tensor in expected.items()}
    np.savez_compressed(folder / "expected.npz", **numbers)


def transformers_names(folder):
    """The tensors under the names that they have in files."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


if __name__ == "__main__":
    main(HERE)
