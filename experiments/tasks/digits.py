"""scikit-learn's handwritten digits: 1,797 real grey 8 x 8 images of ten classes.

Split as VTAB-1k splits its tasks: 800 to train, 200 to validate, the rest to test.
"""

import numpy as np

from experiments.data.source import Arrays, pin, split
from experiments.data.task import Task

NAME = "handwritten digits (scikit-learn)"
TRAIN, VALIDATION = 800, 200
SHA256 = "ed5d0ee6d5a61b611d6cad96c6bd69386d32550c51b259a59996b65ad132fa6c"


def load(split_seed: int = 0) -> Task:
    """Loads the task; its images are 8 x 8.

    Args:
      split_seed: seed that shuffles the images before they are split.
    """
    from sklearn.datasets import load_digits  # slow to import

    pixels, labels = load_digits(return_X_y=True)  # [1797, 64] of 0 to 16, [1797]
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int32)
    pin(NAME, SHA256, images, labels)
    parts = split(Arrays(images, labels), split_seed, TRAIN, VALIDATION)
    return Task(NAME, 10, *parts, names=tuple("0123456789"))
