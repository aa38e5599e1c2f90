"""Tiny images with masks on disk: a bright box on a dark ground."""

import numpy as np
from PIL import Image

SIZES = ((20, 28), (28, 20), (24, 24))  # height, width


def pair(seed, size):
    """An image and its mask, uint8, the mask 0 and 255."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 90, (*size, 3), dtype=np.uint8)
    top, left = (int(rng.integers(0, side // 2)) for side in size)
    box = slice(top, top + size[0] // 2), slice(left, left + size[1] // 2)
    mask = np.zeros(size, np.uint8)
    image[box] += 150
    mask[box] = 255
    return image, mask


def draw(folder, names, seed=0, kinds=("images", "masks"), suffix=".png"):
    """Writes a pair for each name, in three sizes one after the other."""
    for kind in kinds:
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        arrays = pair((seed, number), SIZES[number % len(SIZES)])
        for kind, array in zip(kinds, arrays, strict=True):
            Image.fromarray(array).save(folder / kind / f"{name}{suffix}")
    return folder


def lists(folder, **splits):
    """Writes lists of names, `train=("a", "b")` as `train.txt`."""
    for split, names in splits.items():
        (folder / f"{split}.txt").write_text("\n".join(names) + "\n", "utf-8")
    return folder
