"""Corrupted images: noise, blur, contrast and JPEG, as ImageNet-C defines them.

Hendrycks and Dietterich (arXiv 1903.12261): Gaussian noise, contrast and JPEG with the
parameters of their severities 1, 3 and 5; blur is Pillow's Gaussian, with the radii of
their defocus, which are of 224 pixels and shrink with the image. An image is corrupted
at the size at which the model sees it, the same way for every model.
"""

import dataclasses
import io
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

from experiments.data.source import Example, Source
from experiments.data.transforms import Transform

SEVERITIES = (1, 3, 5)
NOISE = {1: 0.08, 3: 0.18, 5: 0.38}  # deviation, of pixels in [0, 1]
RADIUS, SIDE = {1: 3.0, 3: 6.0, 5: 10.0}, 224
CONTRAST = {1: 0.4, 3: 0.2, 5: 0.05}
QUALITY = {1: 25, 3: 15, 5: 7}
Pixels = UInt8[np.ndarray, "H W C"]


def noise(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Adds Gaussian noise."""
    return _rounded(pixels / 255 + rng.normal(0, NOISE[severity], pixels.shape))


def blur(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Blurs by a Gaussian."""
    radius = RADIUS[severity] * min(pixels.shape[:2]) / SIDE
    picture = _picture(pixels).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(picture).reshape(pixels.shape)


def contrast(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Moves every channel towards its mean."""
    scaled = pixels / 255
    means = scaled.mean((0, 1), keepdims=True)
    return _rounded((scaled - means) * CONTRAST[severity] + means)


def jpeg(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Encodes and decodes as JPEG of low quality."""
    file = io.BytesIO()
    _picture(pixels).save(file, "JPEG", quality=QUALITY[severity])
    with Image.open(file) as picture:
        return np.asarray(picture).reshape(pixels.shape)


KINDS: dict[str, Callable[[Pixels, int, np.random.Generator], Pixels]] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "JPEG": jpeg,
}


@dataclasses.dataclass(frozen=True)
class Corrupted:
    """A source whose images have the model's size and are corrupted.

    Attributes:
      source: the images.
      transform: the model's, of test images.
      kind: one of `KINDS`.
      severity: one of `SEVERITIES`.
    """

    source: Source
    transform: Transform
    kind: str
    severity: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example, rng = self.source[index], np.random.default_rng(index)
        seen = self.transform.unnormalised(self.transform(example["image"], rng))
        pixels = KINDS[self.kind](seen, self.severity, rng)
        return {"image": pixels, "label": example["label"]}


def _picture(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _rounded(pixels: Float[np.ndarray, "H W C"]) -> Pixels:
    """Returns pixels of [0, 1] as bytes."""
    return np.rint(255 * pixels.clip(0, 1)).astype(np.uint8)
