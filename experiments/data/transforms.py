"""Image transforms: resize, augment, normalise pixels of 0 to 255 for a model.

Resizing is Pillow's, antialiased, as in the PyTorch code of the PEFT papers. The crops
and the colour jitter follow torchvision's definitions (`RandomResizedCrop`,
`ColorJitter` without hue), which the released recipe uses for FGVC.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageEnhance

from experiments.data.source import Example

NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
RESAMPLE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop: share of the area, w / h
JITTER = 0.4


@dataclasses.dataclass(frozen=True)
class Transform:
    """Turns an image into what a model takes.

    Attributes:
      size: height and width of the result in pixels.
      crop: "resize" ignores the aspect ratio (VTAB); "centre" resizes the shorter side
        to `size / share` and crops the centre (FGVC, evaluation); "random" crops 8% to
        100% of the area, flips and jitters the colours (FGVC, training).
      mean, std: mean and standard deviation of each channel, for pixels in [0, 1]; one
        or three, as many as the result has channels.
      resample: "bicubic" or "bilinear".
      evaluated: most examples of a batch that is evaluated.
      share: side of the cropped centre over that of the resized image: 0.875 (FGVC,
        DINOv2), or 1 (CLIP).
    """

    size: tuple[int, int]
    crop: Literal["resize", "centre", "random"] = "resize"
    mean: tuple[float, ...] = NORMALISATIONS["imagenet"][0]
    std: tuple[float, ...] = NORMALISATIONS["imagenet"][1]
    resample: Literal["bilinear", "bicubic"] = "bicubic"
    evaluated: int = 256
    share: float = 0.875

    def __post_init__(self):
        if min(self.size) < 1:
            raise ValueError(f"size={self.size}: expected positive numbers of pixels.")
        if self.crop not in ("resize", "centre", "random"):
            raise ValueError(f"crop={self.crop!r}: expected resize, centre or random.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: expected 0 < share <= 1.")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(
                f"mean={self.mean}, std={self.std}: expected 1 or 3 numbers each."
            )

    def __call__(
        self, image: UInt8[np.ndarray, "H W C"], rng: np.random.Generator
    ) -> Float[np.ndarray, "height width channels"]:
        """Returns the image as float32; `rng` draws the crop and the augmentation."""
        picture = _picture(image, len(self.mean))
        match self.crop:
            case "resize":
                picture = self._resize(picture, self.size)
            case "centre":
                picture = self._centre(picture)
            case "random":
                box = random_box(picture.height, picture.width, rng)
                picture = self._resize(picture.crop(box), self.size)
                if rng.random() < 0.5:
                    picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                picture = jitter(picture, rng)
        pixels = np.asarray(picture, np.float32).reshape(*self.size, len(self.mean))
        mean, std = (np.asarray(x, np.float32) for x in (self.mean, self.std))
        return (pixels / np.float32(255) - mean) / std

    def prepare(
        self, example: Example, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Returns the transformed `image` and `label`, int32, for `data.pipeline`."""
        label = np.asarray(example["label"], np.int32)
        return {"image": self(example["image"], rng), "label": label}

    def unnormalised(
        self, image: Float[np.ndarray, "... channels"]
    ) -> UInt8[np.ndarray, "... channels"]:
        """Returns the image with pixels of 0 to 255, to look at."""
        mean, std = (np.asarray(x, np.float32) for x in (self.mean, self.std))
        pixels = image * std + mean
        return np.rint(255 * pixels.clip(0, 1)).astype(np.uint8)

    def _resize(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        height, width = size
        return picture.resize((width, height), RESAMPLE[self.resample])

    def _centre(self, picture: Image.Image) -> Image.Image:
        """Resizes the shorter side to size / share (256 for 224), crops the centre."""
        height, width = (round(side / self.share) for side in self.size)
        if height * picture.width >= width * picture.height:  # the height binds
            width = int(height * picture.width / picture.height)
        else:
            height = int(width * picture.height / picture.width)
        picture = self._resize(picture, (height, width))
        top, left = (
            round((height - self.size[0]) / 2),
            round((width - self.size[1]) / 2),
        )
        return picture.crop((left, top, left + self.size[1], top + self.size[0]))


def random_box(
    height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Returns left, top, right, bottom of a crop of random area and aspect ratio."""
    for _ in range(10):
        area = height * width * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return int(left), int(top), int(left) + w, int(top) + h
    # None fitted: the largest centred crop within the allowed ratios.
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def jitter(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Scales brightness, contrast and saturation by 0.6 to 1.4, in random order."""
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for i in rng.permutation(len(enhancers)):
        factor = rng.uniform(1 - JITTER, 1 + JITTER)
        picture = enhancers[i](picture).enhance(factor)
    return picture


def _picture(image: UInt8[np.ndarray, "H W C"], channels: int) -> Image.Image:
    if image.ndim != 3 or image.shape[2] not in (1, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"an image of shape {image.shape} and {image.dtype}: expected uint8 "
            "[H, W, 1 or 3]."
        )
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return picture.convert("L" if channels == 1 else "RGB")
