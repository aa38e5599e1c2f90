"""Mixup (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899).

Both mix every image of a batch with the one at the mirrored place, with one weight a
batch. Labels become distributions `[B, classes]`, smoothed where asked.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Mix:
    """Mixing of batches with `image [B, H, W, C]` and `label [B]`.

    Attributes:
      classes: number of classes.
      mixup: parameter of mixup's Beta distribution; 0 for no mixup.
      cutmix: the same of CutMix. Where both are on, each batch draws one of them.
      smoothing: share of a label that is spread over all classes (Szegedy et al., arXiv
        1512.00567).
    """

    classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self):
        strengths = self.mixup, self.cutmix
        if not all(0 <= x < np.inf for x in strengths) or not 0 <= self.smoothing < 1:
            raise ValueError(
                f"mixup={self.mixup}, cutmix={self.cutmix}, smoothing="
                f"{self.smoothing}: expected at least 0, and smoothing below 1."
            )

    def __call__(
        self, batch: dict[str, np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Returns the mixed batch; `label` is float32 `[B, classes]`."""
        images, weight = batch["image"], 1.0
        kinds = [kind for kind in ("mixup", "cutmix") if getattr(self, kind)]
        kind = kinds[rng.integers(len(kinds))] if kinds else None
        if kind == "mixup":
            weight = rng.beta(self.mixup, self.mixup)
            images = np.float32(weight) * images + np.float32(1 - weight) * images[::-1]
        elif kind == "cutmix":
            rows, columns = cut_box(
                images.shape[1:3], rng.beta(self.cutmix, self.cutmix), rng
            )
            images = images.copy()
            images[:, rows, columns] = batch["image"][::-1, rows, columns]
            replaced = (rows.stop - rows.start) * (columns.stop - columns.start)
            weight = 1 - replaced / (images.shape[1] * images.shape[2])
        labels = np.eye(self.classes, dtype=np.float32)[batch["label"]]
        labels = (1 - self.smoothing) * labels + self.smoothing / self.classes
        labels = weight * labels + (1 - weight) * labels[::-1]
        return batch | {"image": images, "label": labels.astype(np.float32)}


def cut_box(
    size: tuple[int, ...], weight: float, rng: np.random.Generator
) -> tuple[slice, slice]:
    """Draws a box of `1 - weight` of the area around a pixel, cut at the borders."""
    spans = []
    for side in size:
        half = int(side * np.sqrt(1 - weight)) // 2
        centre = int(rng.integers(side))
        spans.append(slice(max(centre - half, 0), min(centre + half, side)))
    return spans[0], spans[1]
