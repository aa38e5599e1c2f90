"""Transform of an image and its mask to a model's size, and of its output back."""

import dataclasses
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from experiments.data.pairs import Pair
from experiments.data.transforms import NORMALISATIONS, Transform

FITS = ("squash", "pad")


@dataclasses.dataclass(frozen=True)
class MaskTransform:
    """Turns an image and its mask into squares.

    Images are resized bilinearly, antialiased, masks to the nearest pixel.

    Attributes:
      size: height and width of the results in pixels.
      fit: "squash" ignores the aspect ratio (the polyp protocol); "pad" resizes the
        longer side and fills up with zeros, at the bottom and on the right, once the
        pixels are normalised (SAM's own preparation).
      flip: mirror half of the pairs left to right, to train.
      mean, std: mean and standard deviation of each channel, for pixels in [0, 1].
      evaluated: most examples of a batch that is evaluated.
    """

    size: int
    fit: Literal["squash", "pad"] = "squash"
    flip: bool = False
    mean: tuple[float, ...] = NORMALISATIONS["imagenet"][0]
    std: tuple[float, ...] = NORMALISATIONS["imagenet"][1]
    evaluated: int = 4

    def __post_init__(self):
        if self.fit not in FITS:
            raise ValueError(f"fit={self.fit!r}: expected {' or '.join(FITS)}.")
        if self.evaluated < 1:
            raise ValueError(f"evaluated={self.evaluated}: expected at least 1.")
        self._image((self.size, self.size))

    def prepare(self, example: Pair, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns a pair's arrays; `rng` draws the flip.

        Returns:
          `image`, float32 `[size, size, 3]`; `mask`, float32 `[size, size]` of 0 and 1;
          `inside`, bool `[size, size]`, False for padding.
        """
        flipped = self.flips(rng)
        image = self.image(example, flipped)
        return {"image": image, **self.masks(example, flipped)}

    def flips(self, rng: np.random.Generator) -> bool:
        """Draws whether a pair is mirrored."""
        return self.flip and rng.random() < 0.5

    def image(
        self, example: Pair, flipped: bool
    ) -> Float[np.ndarray, "size size channels"]:
        """Returns a pair's image, mirrored if it is to be."""
        height, width = self.fitted(*example["mask"].shape)
        unused = np.random.default_rng(0)  # nothing else of it is random
        image = self._image((height, width))(example["image"], unused)
        return self._filled(image, flipped, np.float32)

    def masks(self, example: Pair, flipped: bool) -> dict[str, np.ndarray]:
        """Returns `mask` and `inside` of a pair, mirrored if they are to be."""
        height, width = self.fitted(*example["mask"].shape)
        picture = Image.fromarray(example["mask"])
        mask = np.asarray(picture.resize((width, height), Image.Resampling.NEAREST))
        return {
            "mask": self._filled(mask, flipped, np.float32),
            "inside": self._filled(np.ones_like(mask), flipped, bool),
        }

    def _filled(self, array: np.ndarray, flipped: bool, dtype: Any) -> np.ndarray:
        """Returns an array at its size, with zeros where it does not reach."""
        height, width, *rest = array.shape
        whole = np.zeros((self.size, self.size, *rest), dtype)
        whole[:height, :width] = array[:, ::-1] if flipped else array
        return whole

    def restored(
        self, output: Float[np.ndarray, "size size"], size: tuple[int, int]
    ) -> Float[np.ndarray, "H W"]:
        """Returns an output at the size of the image that it is of.

        Padding is cut off, the rest resized bilinearly, antialiased where it shrinks.

        Args:
          output: probabilities, or anything else by pixel.
          size: height and width of the image.
        """
        height, width = self.fitted(*size)
        inside = Image.fromarray(np.asarray(output[:height, :width], np.float32))
        resized = inside.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return np.asarray(resized)

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width that an image has before padding.

        >>> MaskTransform(8, "pad").fitted(300, 600), MaskTransform(8).fitted(300, 600)
        ((4, 8), (8, 8))
        """
        if self.fit == "squash":
            return self.size, self.size
        scale = self.size / max(height, width)
        tall, wide = (max(1, int(side * scale + 0.5)) for side in (height, width))
        return tall, wide

    def unnormalised(
        self, image: Float[np.ndarray, "... 3"]
    ) -> UInt8[np.ndarray, "... 3"]:
        """Returns the image with pixels of 0 to 255, to look at."""
        return self._image((self.size, self.size)).unnormalised(image)

    def _image(self, size: tuple[int, int]) -> Transform:
        return Transform(size, "resize", self.mean, self.std, "bilinear")
