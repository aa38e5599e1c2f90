"""Makes a tiny file like `mobile_sam.pt`, and what its image encoder says.

    python tests/assets/mobile_sam/make.py

`mobile_sam.pt` has MobileSAM's and Meta's names; `expected.npz` pixels, of which
windows and padding divide no grid, and their embedding by the oracle of
`tests/helpers/mobile_sam_torch.py`. The prompt encoder and the decoder are random.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "helpers"))

from mobile_sam_torch import Encoder, randomised  # noqa: E402

WIDTH = 16  # of prompts and decoder
SHAPE = {
    "widths": (4, 8, 12, 16),
    "depths": (1, 1, 2, 1),
    "heads": (2, 2, 4),
    "windows": (4, 5, 3),
    "out_channels": WIDTH,
}
MLP, IOU = 24, 12  # hidden widths of the decoder


def layer(n, m, *sides):
    """Shapes of a layer's weight and bias."""
    return {"weight": (m, n, *sides), "bias": (m,)}


def norm(width):
    return {"weight": (width,), "bias": (width,)}


def attention(inner):
    ways = {f"{name}_proj": layer(WIDTH, inner) for name in "qkv"}
    return ways | {"out_proj": layer(inner, WIDTH)}


def head(hidden, out):
    widths = WIDTH, hidden, hidden, out
    pairs = enumerate(itertools.pairwise(widths))
    return {"layers": {str(i): layer(*pair) for i, pair in pairs}}


def rest():
    """Shapes of the prompt encoder and the decoder, by name."""
    vector, half = {"weight": (1, WIDTH)}, WIDTH // 2
    two_way = {
        "self_attn": attention(WIDTH),
        "cross_attn_token_to_image": attention(half),
        "mlp": {"lin1": layer(WIDTH, MLP), "lin2": layer(MLP, WIDTH)},
        "cross_attn_image_to_token": attention(half),
    } | {f"norm{i}": norm(WIDTH) for i in range(1, 5)}
    few, fewer = WIDTH // 4, WIDTH // 8
    upscaling = {  # transposed: [in, out, 2, 2]
        "0": {"weight": (WIDTH, few, 2, 2), "bias": (few,)},
        "1": norm(few),
        "3": {"weight": (few, fewer, 2, 2), "bias": (fewer,)},
    }
    return {
        "prompt_encoder": {
            "pe_layer": {"positional_encoding_gaussian_matrix": (2, half)},
            "point_embeddings": {str(i): vector for i in range(4)},
            "not_a_point_embed": vector,
            "no_mask_embed": vector,
            "mask_downscaling": {
                "0": layer(1, 4, 2, 2),
                "1": norm(4),
                "3": layer(4, 16, 2, 2),
                "4": norm(16),
                "6": layer(16, WIDTH, 1, 1),
            },
        },
        "mask_decoder": {
            "transformer": {
                "layers": {"0": two_way, "1": two_way},
                "final_attn_token_to_image": attention(half),
                "norm_final_attn": norm(WIDTH),
            },
            "iou_token": vector,
            "mask_tokens": {"weight": (4, WIDTH)},
            "output_upscaling": upscaling,
            "output_hypernetworks_mlps": {
                str(i): head(WIDTH, WIDTH // 8) for i in range(4)
            },
            "iou_prediction_head": head(IOU, 4),
        },
    }


def drawn(shapes, prefix=""):
    """Random tensors of these shapes, by name."""
    found = {}
    for name, shape in shapes.items():
        if isinstance(shape, dict):
            found |= drawn(shape, f"{prefix}{name}.")
        else:
            found[prefix + name] = torch.randn(shape) * 0.3
    return found


def main(folder=HERE, seed=0):
    torch.manual_seed(seed)
    encoder = randomised(Encoder(**SHAPE))
    state = {f"image_encoder.{name}": t for name, t in encoder.state_dict().items()}
    torch.save(state | drawn(rest()), folder / "mobile_sam.pt")
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        embedding = encoder(images)
    np.savez(
        folder / "expected.npz",
        images=images.permute(0, 2, 3, 1).numpy(),
        embedding=embedding.permute(0, 2, 3, 1).numpy(),
    )


if __name__ == "__main__":
    main()
