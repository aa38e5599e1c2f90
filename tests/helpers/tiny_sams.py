"""Tiny random SAMs with either encoder, and a folder of pairs to train them on."""

import masks
from places import ROOT

from snella_jax.models import sam

FILES = {
    "tiny_vit": ROOT / "tests/assets/mobile_sam/mobile_sam.pt",
    "vit": ROOT / "tests/assets/sam/transformers",
}
SIDE = 32  # pixels of their images


def load(encoder):
    """A SAM with this encoder, for images of 32 x 32."""
    return sam.load(FILES[encoder], image_size=SIDE)


def task(path):
    """Writes pairs in three splits."""
    splits = {"train": "abcdefgh", "val": "ijkl", "test": "mnop"}
    names = [name for own in splits.values() for name in own]
    return masks.lists(masks.draw(path, names), **splits)
