"""Makes the files beside it: `pip install -e ".[test,reference]"`, `python make.py`.

A tiny `SamModel` of transformers whose every parameter is drawn anew (many are 0 at
first): its folder, the same weights in Meta's format (`sam_vit.pth`), and what
transformers computes with them (`expected.npz`), once more with the numbers of `OTHER`
in the config. The grid of 5 x 5 is padded for windows of 3.
"""

import re
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
SIZE = {"image_size": 80}
VISION = {
    "hidden_size": 16,
    "output_channels": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "window_size": 3,
    "global_attn_indexes": [1],
    "mlp_dim": 24,
    "num_pos_feats": 8,
}
PROMPTS = {"hidden_size": 16, "mask_input_channels": 8}
DECODER = {"hidden_size": 16, "mlp_dim": 20, "iou_head_hidden_dim": 12}
OTHER = {  # what no shape says, by the section of `config.json`
    "vision_config": {"layer_norm_eps": 0.05},
    "mask_decoder_config": {"layer_norm_eps": 0.1, "num_attention_heads": 4},
}
META = [  # names in Meta's files, part by part
    (r"^vision_encoder\.", "image_encoder."),
    (r"^(image_encoder\.)layers\.", r"\1blocks."),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"(neck|blocks\.\d+|layers\.\d+)\.layer_norm(\d)", r"\1.norm\2"),
    (r"neck\.conv1", "neck.0"),
    (r"neck\.norm1", "neck.1"),
    (r"neck\.conv2", "neck.2"),
    (r"neck\.norm2", "neck.3"),
    (
        r"^shared_image_embedding\.positional_embedding",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"\.point_embed\.", ".point_embeddings."),
    (r"mask_embed\.conv1", "mask_downscaling.0"),
    (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
    (r"mask_embed\.conv2", "mask_downscaling.3"),
    (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
    (r"mask_embed\.conv3", "mask_downscaling.6"),
    (r"layer_norm_final_attn", "norm_final_attn"),
    (r"upscale_conv1", "output_upscaling.0"),
    (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"(mlps\.\d|head)\.layers\.0", r"\1.layers.1"),
    (r"(mlps\.\d|head)\.proj_in", r"\1.layers.0"),
    (r"(mlps\.\d|head)\.proj_out", r"\1.layers.2"),
]
TIED = "prompt_encoder.shared_embedding.positional_embedding"
# Prompts by case, and if three masks are asked for.
CASES = {
    "nothing": ([], False),
    "points": (["points", "labels"], False),
    "boxes": (["boxes"], True),
    "all": (["points", "labels", "boxes", "mask"], True),
}


def model_of(changes=None):
    sections = {
        "vision_config": VISION | SIZE,
        "prompt_encoder_config": PROMPTS | SIZE,
        "mask_decoder_config": DECODER,
    }
    for name, fields in (changes or {}).items():
        sections[name] = sections[name] | fields
    return transformers.SamModel(transformers.SamConfig(**sections)).eval()


def drawn(model):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.4)
            if weight.ndim == 1 and "norm" in name and name.endswith("weight"):
                weight.add_(1)
    return model


def meta_name(name):
    for pattern, new in META:
        name = re.sub(pattern, new, name)
    return name


def outputs(model, inputs, names, multimask):
    given = {"points": "input_points", "labels": "input_labels"}
    given |= {"boxes": "input_boxes", "mask": "input_masks"}
    prompts = {given[name]: torch.tensor(inputs[name][:, None]) for name in names}
    pixels = torch.tensor(inputs["images"].transpose(0, 3, 1, 2))
    given = {"pixel_values": pixels} | prompts
    given = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    # In float32 norms of four channels are off by as much as 3e-5 of the largest.
    with torch.no_grad():
        out = model.double()(multimask_output=multimask, **given)
    found = out.pred_masks[:, 0], out.iou_scores[:, 0]
    return tuple(array.float().numpy() for array in found)


def drawn_inputs(seed):
    draw = np.random.default_rng(seed)
    return {
        "images": np.float32(draw.normal(size=(2, 80, 80, 3)).round(1)),
        "points": draw.uniform(0, 80, (2, 3, 2)).astype(np.float32),
        "labels": np.array([[1, 0, 1], [0, 1, -1]]),
        "boxes": np.array([[3, 5, 60, 70.5], [10, 2, 44.5, 79]], np.float32),
        "mask": draw.normal(size=(2, 20, 20)).astype(np.float32),
    }


def main(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    model, inputs = drawn(model_of()), drawn_inputs(seed)
    model.save_pretrained(folder / "transformers")
    state = {name: t for name, t in model.state_dict().items() if name != TIED}
    meta = {meta_name(name): tensor.clone() for name, tensor in state.items()}
    torch.save(meta, folder / "sam_vit.pth")
    expected = dict(inputs)
    other = model_of(OTHER)
    other.load_state_dict(model.state_dict())
    runs = {case: (model, *how) for case, how in CASES.items()}
    runs["other"] = other, *CASES["points"]
    for case, (own, names, multimask) in runs.items():
        masks, iou = outputs(own, inputs, names, multimask)
        expected |= {f"{case}/masks": masks, f"{case}/iou": iou}
    np.savez_compressed(folder / "expected.npz", **expected)


if __name__ == "__main__":
    main(HERE)
