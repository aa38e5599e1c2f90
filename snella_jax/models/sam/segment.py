"""From a photograph of any size to masks of its size, as SAM's own code does it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, UInt8

from snella_jax.models.sam.model import Sam, check_labels

Size = tuple[int, int]


def segment(
    model: Sam,
    image: UInt8[np.ndarray, "height width 3"],
    points: Any = None,
    labels: Any = None,
    boxes: Any = None,
    multimask: bool = False,
) -> tuple[Bool[np.ndarray, "M height width"], Float[np.ndarray, " M"]]:
    """Returns the masks of one photograph, and a prediction of each one's IoU.

    The photograph's longer side is resized to that of the model's images (bilinear,
    smoothed where it shrinks, rounded to 8 bits), normalised, and padded with zeros to
    the right and below. Logits are resized to the model's images, cut, resized to the
    photograph, and masks are where they are positive.

    >>> from flax import nnx
    >>> from snella_jax.models import sam
    >>> sizes = {"widths": (4, 8, 8, 12), "depths": (1, 1, 1, 1), "heads": (2, 2, 3)}
    >>> model = sam.create(
    ...     "sam_tinyvit", **sizes, out_channels=16, image_size=32, rngs=nnx.Rngs(0))
    >>> photograph = np.zeros((30, 40, 3), np.uint8)
    >>> masks, iou = segment(model, photograph, boxes=(5, 5, 20, 25), multimask=True)
    >>> masks.shape, iou.shape
    ((3, 30, 40), (3,))

    Args:
      model: plain or adapted; its images may have any size.
      image: RGB, 0 to 255; a NumPy array, or an RGB image of Pillow.
      points: `[N, 2]`, as (x, y) in pixels of the photograph.
      labels: `[N]`, 1 for points on the object, 0 for points beside it.
      boxes: the box around the object, (x0, y0, x1, y1) in pixels of the photograph.
      multimask: True for masks 1 to 3, False for mask 0.

    Raises:
      TypeError: the image is not of uint8, or labels are no integers.
      ValueError: the image is not RGB, a prompt has another shape or lies beside the
        photograph, a box has no area, or a label is not 1, 0 or -1.
    """
    pixels = np.asarray(image)
    _check_image(pixels)
    size = pixels.shape[:2]
    target = model.config.image_hw
    inside = _fitted(size, target)
    scale = np.array(inside[::-1], np.float32) / np.array(size[::-1], np.float32)
    prompts: dict[str, Any] = {}
    if points is not None:
        there = _numbers("points", points, (-1, 2))
        _check_points(there, labels, size)
        prompts["points"] = (there * scale)[None]
    if labels is not None:
        check_labels(np.asarray(labels))  # inside nnx.jit their values are not seen
        prompts["labels"] = np.asarray(labels)[None]
    if boxes is not None:
        box = _numbers("boxes", boxes, (4,))
        _check_box(box, size)
        prompts["boxes"] = (box.reshape(2, 2) * scale).reshape(1, 4)
    shown = model.normalise(jnp.asarray(resized(pixels, inside), jnp.float32) / 255)
    ends = [(0, whole - part) for whole, part in zip(target, inside, strict=True)]
    masks, iou = _predicted(
        model, jnp.pad(shown, (*ends, (0, 0)))[None], prompts, multimask
    )
    return np.asarray(restored(masks[0], inside, target, size) > 0), np.asarray(iou[0])


def resized(
    pixels: UInt8[np.ndarray, "height width C"], size: Size
) -> UInt8[np.ndarray, "h w C"]:
    """Resizes 8-bit pixels as Pillow does: rows, then columns, rounded each time.

    A triangle of the width of a new pixel weighs the old ones where the image shrinks;
    numbers differ from Pillow's by 1 in few places, as it rounds its weights (and in
    more where Pillow 13 takes columns first: shapes that change a lot).
    """
    height, width = size
    for shape in ((pixels.shape[0], width), (height, width)):
        whole = jnp.asarray(pixels, jnp.float32)
        whole = jax.image.resize(whole, (*shape, pixels.shape[2]), "linear")
        pixels = np.asarray(jnp.floor(whole + 0.5).clip(0, 255).astype(jnp.uint8))
    return pixels


def restored(
    logits: Float[jax.Array, "M h w"], inside: Size, target: Size, size: Size
) -> Float[jax.Array, "M height width"]:
    """Resizes logits to a photograph.

    Args:
      logits: the model's.
      inside: height and width of the photograph within the model's images.
      target: height and width of these.
      size: height and width of the photograph.
    """
    count = len(logits)
    whole = jax.image.resize(logits, (count, *target), "linear", antialias=False)
    own = whole[:, : inside[0], : inside[1]]
    return jax.image.resize(own, (count, *size), "linear", antialias=False)


@nnx.jit(static_argnames="multimask")
def _predicted(
    model: Sam, images: Any, prompts: dict[str, Any], multimask: bool
) -> Any:
    return model(images, multimask=multimask, **prompts)


def _fitted(size: Size, target: Size) -> Size:
    """Returns the largest height and width of the same shape that fit, rounded.

    >>> _fitted((600, 800), (1024, 1024)), _fitted((2000, 3), (64, 64))
    ((768, 1024), (64, 1))
    """
    scale = min(new / old for new, old in zip(target, size, strict=True))
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


def _check_image(pixels: np.ndarray) -> None:
    channels = pixels.shape[2] if pixels.ndim == 3 else None
    if channels != 3 or 0 in pixels.shape:
        kinds = {1: " (grey: repeat it)", 4: " (an alpha channel: drop it)"}
        kind = (
            " (grey: repeat it)" if pixels.ndim == 2 else kinds.get(channels or 0, "")
        )
        raise ValueError(
            f"the image has shape {pixels.shape}{kind}: expected RGB, "
            "[height, width, 3]."
        )
    if pixels.dtype != np.uint8:
        raise TypeError(f"the image is {pixels.dtype}: expected uint8, 0 to 255.")


def _check_box(box: np.ndarray, size: Size) -> None:
    (x0, y0, x1, y1), (height, width) = box, size
    x, y = max(x0, 0) < min(x1, width), max(y0, 0) < min(y1, height)  # some of it
    if not (x and y):
        raise ValueError(
            f"boxes={box.tolist()}: expected (x0, y0, x1, y1) with x0 < x1 and "
            f"y0 < y1, on a photograph {width} pixels wide and {height} high."
        )


def _check_points(points: np.ndarray, labels: Any, size: Size) -> None:
    """Raises a `ValueError` for points beside the photograph, but for fillers (-1)."""
    beside = ((points < 0) | (points > size[::-1])).any(1)
    if labels is not None and np.shape(labels) == beside.shape:
        beside &= np.asarray(labels) >= 0
    if beside.any():
        raise ValueError(
            f"points={points[beside].tolist()}: expected (x, y) on a photograph "
            f"{size[1]} pixels wide and {size[0]} high."
        )


def _numbers(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    numbers = np.asarray(value, np.float32)
    known = len(shape) == numbers.ndim and numbers.shape[-1] == shape[-1]
    if not known:
        axes = "N, 2" if shape[0] < 0 else "4"
        raise ValueError(
            f"{name} has shape {numbers.shape}: expected [{axes}], in pixels of the "
            "photograph."
        )
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name}={numbers.tolist()}: expected finite numbers.")
    return numbers
