"""scikit-learn's handwritten digits: 1,797 real grey 8 x 8 images of ten classes.

Split as VTAB-1k splits its tasks: 800 to train, 200 to choose by, the rest to test.
"""

import jax
import numpy as np
from sklearn.datasets import load_digits

from experiments.data.task import Split, Task
from experiments.small_vit import SMALL, normalise

NAME = "handwritten digits (scikit-learn)"
TRAIN, VALIDATION = 800, 200


def load(split_seed: int = 0) -> Task:
    """The task, its images upsampled (bilinear) and normalised for the small ViT.

    Args:
      split_seed: shuffles the images before they are split.
    """
    pixels, labels = load_digits(return_X_y=True)  # [1797, 64] of 0 to 16, [1797]
    images = pixels.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    shape = (len(images), *SMALL.image_hw, 1)
    images = normalise(np.asarray(jax.image.resize(images, shape, "bilinear")))
    labels = labels.astype(np.int32)
    order = np.random.default_rng(split_seed).permutation(len(images))
    parts = np.split(order, [TRAIN, TRAIN + VALIDATION])
    train, validation, test = (Split(images[part], labels[part]) for part in parts)
    return Task(NAME, 10, train, validation, test)
