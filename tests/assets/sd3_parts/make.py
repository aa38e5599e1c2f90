"""Makes the files beside it: `pip install -e ".[test,reference]"`, `python make.py`.

A tiny autoencoder of diffusers 0.42.1 and a tiny encoder of a T5 of transformers 5.24,
in two shards, both with random numbers everywhere; images and tokens, and what both
make of them in float64 (`expected.npz`).
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import T5Config, T5EncoderModel

HERE = Path(__file__).parent
LEVELS = 3


def redrawn(model):
    """Draws every number anew; the scales of norms stay near 1."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = "norm" in name and name.endswith("weight")
            weight.copy_(scale + 0.3 * torch.randn_like(weight))
    return model.eval()


def make_vae():
    return AutoencoderKL(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5,
        shift_factor=0.25,
    )


def make_t5():
    config = T5Config(
        vocab_size=30,
        d_model=16,
        d_kv=6,
        d_ff=20,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def main() -> None:
    torch.manual_seed(0)
    vae, t5 = redrawn(make_vae()), redrawn(make_t5())
    vae.save_pretrained(HERE / "vae")
    t5.save_pretrained(HERE / "t5", max_shard_size="10KB")
    images, latents = 2 * torch.rand(2, 3, 12, 18) - 1, torch.randn(2, 3, 3, 4)
    tokens = torch.randint(0, 30, (2, 27))
    vae, t5 = vae.double(), t5.double()
    with torch.no_grad():
        moments = vae.encode(images.double()).latent_dist
        found = {
            "images": images,
            "mean": moments.mean,
            "logvar": moments.logvar,
            "latents": latents,
            "decoded": vae.decode(latents.double()).sample,
        }
        hidden = t5(tokens).last_hidden_state
    channels_last = {
        name: np.float32(value.permute(0, 2, 3, 1)) for name, value in found.items()
    }
    np.savez(
        HERE / "expected.npz",
        tokens=np.int32(tokens),
        hidden=np.float32(hidden),
        **channels_last,
    )


if __name__ == "__main__":
    main()
