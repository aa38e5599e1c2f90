"""Fingerprints of a run's inputs: its examples and its base's weights.

`inputs.json` in a run folder holds them: a resumed run must have the same inputs.
Devices and versions may change (`environment.json`).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from jaxtyping import UInt8

Inputs = dict[str, Any]


def of_image(image: UInt8[np.ndarray, "H W C"], label: int) -> bytes:
    """Returns the SHA-256 of an image, its shape and its label."""
    hashed = hashlib.sha256(repr((image.shape, int(label))).encode())
    hashed.update(np.ascontiguousarray(image).data)
    return hashed.digest()


def of_pair(image: UInt8[np.ndarray, "H W C"], mask: UInt8[np.ndarray, "H W"]) -> bytes:
    """Returns the SHA-256 of an image and its mask."""
    hashed = hashlib.sha256(of_image(image, 0))
    hashed.update(np.ascontiguousarray(mask).data)
    return hashed.digest()


def of_split(examples: Sequence[bytes], unit: str = "images") -> dict[str, Any]:
    """Returns the fingerprint of a split, from those of its examples.

    Args:
      examples: fingerprints of the examples, in order.
      unit: name of them, in the plural.

    Returns:
      Their number, by `unit`; `sha256` of all of them in order; `in_any_order`, a
      SHA-256 that does not depend on the order.
    """
    whole, sorted_ = (hashlib.sha256(b"".join(x)) for x in (examples, sorted(examples)))
    return {
        unit: len(examples),
        "sha256": whole.hexdigest(),
        "in_any_order": sorted_.hexdigest(),
    }


def of_files(paths: Sequence[Path]) -> dict[str, str]:
    """Returns the SHA-256 of files, by name."""
    found = {}
    for path in paths:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def of(splits: dict[str, Any], classes: int, weights: Sequence[Path]) -> Inputs:
    """Returns the content of `inputs.json`.

    Args:
      splits: results of `of_split`, by split.
      classes: number of classes of the task, which may be more than the labels show.
      weights: files that the base is read from.
    """
    return {
        "data": splits,
        "classes": classes,
        "weights": of_files(weights),
        "pillow": PIL.__version__,
    }


def differences(known: Inputs, now: Inputs) -> list[str]:
    """Returns the differences between two fingerprints, each as a text.

    >>> images = {"images": 2, "sha256": "ab", "in_any_order": "b"}
    >>> known = {"data": {"train": images}, "classes": 2, "weights": {}}
    >>> now = known | {"data": {"train": images | {"sha256": "ba"}}, "classes": 3}
    >>> for text in differences(known, now):
    ...     print(text)
    the data of train differ (the same images in another order)
    the classes differ (2 then, 3 now)
    """
    found = [
        f"the data of {split} differ ({_how(known['data'][split], own)})"
        for split, own in now["data"].items()
        if own != known["data"][split]
    ]
    if known.get("classes") != now.get("classes"):
        found.append(
            f"the classes differ ({known['classes']} then, {now['classes']} now)"
        )
    before, after = known["weights"], now["weights"]
    other = [f for f in before.keys() | after.keys() if before.get(f) != after.get(f)]
    if before and after and other:  # none: random ones, of a control
        found.append(f"the base's weights differ ({', '.join(sorted(other))})")
    if found and known.get("pillow") != now.get("pillow"):
        found.append(
            f"Pillow, which decodes images, was {known.get('pillow')} and is "
            f"{now.get('pillow')}"
        )
    return found


def _how(known: dict[str, Any], now: dict[str, Any]) -> str:
    unit = next(name for name in now if name not in ("sha256", "in_any_order"))
    if known[unit] != now[unit]:
        return f"{known[unit]} {unit} then, {now[unit]} now"
    if known["in_any_order"] == now["in_any_order"]:
        return f"the same {unit} in another order"
    return f"other {unit} or labels"
