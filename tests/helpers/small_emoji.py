"""A package of emoji with few pictures, of one colour each, and a tokenizer for it."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.tasks import emoji
from experiments.tasks.emoji_captions import SCENES
from snella_jax.models.sd3.tokenizers import Tokenizer

START, END = 900, 901  # ids of letters are below
NAMES = {
    "DOG FACE": ("dog", "Animals & Nature", "animal-mammal"),
    "CAT FACE": ("cat", "Animals & Nature", "animal-mammal"),
    "CRYING CAT FACE": ("crying_cat_face", "Smileys & Emotion", "cat-face"),
    "LEFT ARROW": ("arrow_left", "Symbols", "arrow"),
    "PURPLE HEART": ("purple_heart", "Smileys & Emotion", "heart"),
    "FRANCE FLAG": ("flag-fr", "Flags", "country-flag"),
    "PALE": ("skin-tone-2", "Component", "skin-tone"),
    **{name.upper(): (name, "Travel & Places", "place-other")
       for name in SCENES.values()},
}  # fmt: skip


def package(folder: Path) -> Path:
    """Writes the package; the colour of the i-th picture is (10 i, 100, 200)."""
    (folder / emoji.IMAGES).mkdir(parents=True)
    entries = []
    for i, (name, (short, category, subcategory)) in enumerate(NAMES.items()):
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[16:48, 16:48] = (*colour(name.lower()), 255)
        Image.fromarray(pixels).save(folder / emoji.IMAGES / f"{i}.png")
        entries.append(
            {
                "name": name,
                "short_name": short,
                "category": category,
                "subcategory": subcategory,
                "image": f"{i}.png",
                "has_img_twitter": True,
            }
        )
    (folder / "emoji.json").write_text(json.dumps(entries), "utf-8")
    return folder


def colour(name: str) -> tuple[int, int, int]:
    """Returns the colour of an emoji's picture."""
    return 10 * list(NAMES).index(name.upper()), 100, 200


def tokenizer() -> Tokenizer:
    """Returns a tokenizer with an id for each word, made from its letters."""
    return Tokenizer(
        size=902,
        start=START,
        end=END,
        pad=END,
        length=77,
        to_ids=lambda text: [_id(word) for word in text.lower().split()],
    )


def _id(word: str) -> int:
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(word)) % START
