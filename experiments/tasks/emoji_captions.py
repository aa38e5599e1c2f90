"""Captions of emoji, and the pictures that go with them, for training the toy.

Besides the plain picture an emoji is drawn on a coloured background or, smaller, in
front of a scene, so that places are words of their own. A quarter of these pairs is
never drawn and left to see whether combinations are understood.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Float, UInt8

from experiments.tasks.dreambooth import CLASSES, LIVE, SUBJECTS, prompts
from experiments.tasks.emoji import FAMILIES, Emoji, on, pictures

WHITE = (255, 255, 255)
COLOURS = {
    "red": (221, 46, 68),
    "orange": (244, 144, 12),
    "yellow": (253, 203, 88),
    "green": (120, 177, 89),
    "blue": (85, 172, 238),
    "purple": (170, 142, 214),
    "brown": (193, 105, 79),
    "pink": (244, 171, 186),
    "grey": (153, 170, 181),
    "black": (41, 47, 51),
}
# Places of DreamBooth's prompts first; which emoji is behind the subject.
SCENES = {
    "on the beach": "beach with umbrella",
    "with a city in the background": "cityscape",
    "with a mountain in the background": "snow-capped mountain",
    "with a house in the background": "house with garden",
    "with a tree in the background": "deciduous tree",
    "in the desert": "desert",
    "at night": "night with stars",
    "at sunset": "sunset over buildings",
}
# Everyday words for emoji, among them DreamBooth's classes.
EVERYDAY = {
    "school satchel": "backpack",
    "athletic shoe": "sneaker",
    "teddy bear": "stuffed animal",
    "nesting dolls": "toy",
    "amphora": "vase",
    "eyeglasses": "glasses",
    "sunglasses": "glasses",
    "womans boots": "boot",
    "hiking boot": "boot",
    "canned food": "can",
    "bowl with spoon": "bowl",
    "alien monster": "cartoon",
    "mantelpiece clock": "clock",
    "alarm clock": "clock",
    "full moon symbol": "moon",
    "monkey face": "monkey",
    "open book": "book",
    "heavy black heart": "red heart",
}
SPARE = tuple(f"<spare{i}>" for i in range(8))  # words of the rows for --token
KINDS = ("plain", "token", "colour", "scene", "empty")
SHARES = (0.58, 0.12, 0.12, 0.08, 0.1)
FORMS = {  # shares
    "{name}": 0.35,
    "a picture of {name}": 0.15,
    "a photo of {short}": 0.1,
    "{short}": 0.2,
    "a {short}": 0.1,
    "{name}, {kind}": 0.1,
}
FLAT = ("Symbols", "Flags")  # categories that stand in front of no scene
# Subcategories, or their beginnings, that mean the same as in a mirror.
MIRRORED = (
    *("animal-", "plant-", "food-", "drink", "dishware", "face-", "heart"),
    *("clothing", "transport-ground", "transport-water", "place-", "household"),
    *("musical-instrument", "tool", "person-role", "person-fantasy", "emotion"),
)
SMALL = 22  # side of a subject in front of a scene, in pixels


@dataclasses.dataclass(frozen=True, eq=False)
class Album:
    """Emoji and their pictures, from which captioned examples are drawn.

    Attributes:
      emoji: those that are drawn.
      large: their pictures, as `emoji.pictures` gives them.
      small: the same with `SMALL` pixels a side.
      scenes: pictures behind a subject, by the words for the place.
    """

    emoji: list[Emoji]
    large: Float[np.ndarray, "N 32 32 4"]
    small: Float[np.ndarray, "N 22 22 4"]
    scenes: dict[str, Float[np.ndarray, "32 32 4"]]

    def __len__(self) -> int:
        return len(self.emoji)

    def example(
        self, index: int, rng: np.random.Generator
    ) -> tuple[UInt8[np.ndarray, "32 32 3"], str]:
        """Draws a picture of an emoji, and a caption; "" for one in ten."""
        one, flip = self.emoji[index], 1
        if mirrored(one) and rng.random() < 0.5:
            flip = -1
        kind = KINDS[rng.choice(len(KINDS), p=SHARES)]
        if kind == "colour" and one.category != "Flags":
            allowed = [c for c in COLOURS if not withheld(one, c)]
            colour = allowed[rng.integers(len(allowed))]
            caption = f"{_subject(one, rng)} on a {colour} background"
            return on(self.large[index][:, ::flip], COLOURS[colour]), caption
        if kind == "scene" and one.category not in FLAT:
            allowed = [s for s in self.scenes if not withheld(one, s)]
            scene = allowed[rng.integers(len(allowed))]
            caption = f"{_subject(one, rng)} {scene}"
            return self.before(scene, self.small[index][:, ::flip]), caption
        caption = ""
        if kind == "token":
            start = ("a", "a photo of")[rng.integers(2)]
            caption = f"{start} {_spare(rng)} {_words(one, rng)}"
        elif kind != "empty":
            form = tuple(FORMS)[rng.choice(len(FORMS), p=tuple(FORMS.values()))]
            caption = form.format(
                name=one.name, short=_words(one, rng), kind=_spaced(one.subcategory)
            )
        return on(self.large[index][:, ::flip], WHITE), caption

    def before(
        self, scene: str, subject: Float[np.ndarray, "22 22 4"]
    ) -> UInt8[np.ndarray, "32 32 3"]:
        """Lays a subject over the lower middle of a scene."""
        picture = on(self.scenes[scene], WHITE)
        left = (picture.shape[1] - SMALL) // 2
        place = np.s_[-SMALL:, left : left + SMALL]
        picture[place] = on(subject, picture[place])
        return picture


def album(emoji: list[Emoji], drawn: list[Emoji]) -> Album:
    """Reads the pictures of the emoji that are drawn, and of the scenes.

    Args:
      emoji: all there are.
      drawn: those that examples are made of.
    """
    large = pictures(drawn)
    shape = (len(drawn), SMALL, SMALL, 4)
    small = np.asarray(jax.image.resize(large, shape, "linear"))
    by_name = {one.name: one for one in emoji}
    behind = pictures([by_name[name] for name in SCENES.values()])
    return Album(drawn, large, small, dict(zip(SCENES, behind, strict=True)))


def mirrored(one: Emoji) -> bool:
    """Returns True if the mirror image of an emoji means the same."""
    turned = {"left", "right", "facing", "reversed", "z"} & set(one.name.split())
    return one.subcategory.startswith(MIRRORED) and not turned


def withheld(one: Emoji, place: str) -> bool:
    """Returns True for a pair of an emoji and a colour or scene that is never drawn."""
    return zlib.crc32(f"{one.name}, {place}".encode()) % 4 == 0


def texts(emoji: list[Emoji]) -> Iterator[str]:
    """Yields texts with all words of the captions and of DreamBooth's prompts."""
    for one in emoji:
        yield from (one.name, *everyday(one), f"{one.name}, {_spaced(one.subcategory)}")
    yield from (f"a photo of a {word} background" for word in COLOURS)
    yield "a picture of"
    yield from (*SCENES, *(family.class_name for family in FAMILIES.values()))
    for subject in SUBJECTS:
        yield from prompts("", CLASSES.get(subject, subject), subject in LIVE)


@functools.cache
def everyday(one: Emoji) -> tuple[str, ...]:
    """Returns the short names of an emoji."""
    return tuple(filter(None, (one.short, EVERYDAY.get(one.name))))


def _words(one: Emoji, rng: np.random.Generator) -> str:
    """Draws one of the short names of an emoji."""
    names = everyday(one)
    return names[rng.integers(len(names))]


def _subject(one: Emoji, rng: np.random.Generator) -> str:
    """Draws what a caption calls an emoji that is somewhere."""
    start = ("", "a ", f"a {_spare(rng)} ")[rng.integers(3)]
    return start + _words(one, rng)


def _spare(rng: np.random.Generator) -> str:
    return SPARE[rng.integers(len(SPARE))]


def _spaced(subcategory: str) -> str:
    return subcategory.replace("-", " ")
