"""Tiny random SAMs with either encoder, and folders of pairs to train them on."""

import masks
from flax import nnx
from places import ROOT

from snella_jax.models import export, sam

TINY_VIT = ROOT / "tests/assets/mobile_sam/mobile_sam.pt"
SIDE = 32  # pixels
VIT = {"width": 16, "depth": 3, "heads": 2, "mlp_dim": 24, "window": 1}
VIT |= {"global_blocks": (1,), "out_channels": 16, "image_size": SIDE}
VIT |= {"decoder_mlp_dim": 24, "iou_hidden": 12}


def tiny_vit(**options):
    """A SAM with a TinyViT, in 32 x 32 pixels."""
    return sam.load(TINY_VIT, image_size=SIDE, **options)


def vit():
    """A SAM with a ViT, in 32 x 32 pixels."""
    return sam.create("sam_vit_b", **VIT, rngs=nnx.Rngs(0))


def vit_folder(path):
    """Writes the SAM with a ViT as a folder of Hugging Face."""
    export(vit(), path)
    return path


def task(path):
    """Writes pairs in three splits."""
    splits = {"train": "abcdefgh", "val": "ijkl", "test": "mnop"}
    names = [name for own in splits.values() for name in own]
    return masks.lists(masks.draw(path, names), **splits)
