"""ELPV (Deitsch et al., 2019): 2,624 real grey 300 x 300 photographs of solar cells.

In the PyPI package `elpv-dataset` (`pip install -e ".[demo]"`; 91 MB, CC-BY-NC-SA 4.0).
An expert's defect probability is 0, 1/3, 2/3 or 1 for 1508, 295, 106 and 715 of them;
1,550 cells are polycrystalline, 1,074 monocrystalline.
"""

import dataclasses

import numpy as np
from jaxtyping import Int, UInt8

NAME = "ELPV"
SIZE = 2624


@dataclasses.dataclass(frozen=True)
class Elpv:
    """The whole set.

    Attributes:
      images: 0 to 255.
      defect: class 0 to 3, three times the defect probability.
      mono: 1 for a monocrystalline cell, 0 for a polycrystalline one.
    """

    images: UInt8[np.ndarray, "2624 300 300 1"]
    defect: Int[np.ndarray, " 2624"]
    mono: Int[np.ndarray, " 2624"]


def load() -> Elpv:
    """Every photograph, in the package's order.

    Raises:
      ModuleNotFoundError: the package is not installed; says how.
    """
    try:
        from elpv_dataset.utils import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'ELPV is in elpv-dataset: pip install -e ".[demo]"'
        ) from error
    images, probability, kind = load_dataset()
    defect = np.rint(3 * probability).astype(np.int32)
    return Elpv(images[..., None], defect, (kind == "mono").astype(np.int32))
