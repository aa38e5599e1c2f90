"""DreamBooth's 30 subjects and 25 prompts (Ruiz et al., CVPR 2023), or a folder.

158 photographs, CC BY 4.0, many of them from Unsplash: github.com/google/dreambooth.
The prompts are those of its `prompts_and_classes.txt`.
"""

import dataclasses
from pathlib import Path

from experiments.data import photographs
from experiments.data.photographs import Photographs
from experiments.names import unknown
from experiments.paths import at_home

SITE = "https://github.com/google/dreambooth"
CREDIT = "Photographs: DreamBooth (Ruiz et al.), CC BY 4.0"
HELP = "python -m experiments.dreambooth --help"
# Of subjects whose class is not called as they are; live ones below.
CLASSES = {
    "backpack_dog": "backpack",
    "bear_plushie": "stuffed animal",
    "berry_bowl": "bowl",
    "cat2": "cat",
    "colorful_sneaker": "sneaker",
    **{f"dog{number}": "dog" for number in (2, 3, 5, 6, 7, 8)},
    "duck_toy": "toy",
    "fancy_boot": "boot",
    "grey_sloth_plushie": "stuffed animal",
    "monster_toy": "toy",
    "pink_sunglasses": "glasses",
    "poop_emoji": "toy",
    "rc_car": "toy",
    "red_cartoon": "cartoon",
    "robot_toy": "toy",
    "shiny_sneaker": "sneaker",
    "wolf_plushie": "stuffed animal",
}
LIVE = ("cat", "cat2", "dog", *(f"dog{number}" for number in (2, 3, 5, 6, 7, 8)))
ALSO = ("backpack", "can", "candle", "cat", "clock", "dog", "teapot", "vase")
SUBJECTS = tuple(sorted({*CLASSES, *ALSO}))

# What follows "a {token} {class}" in prompts.
PLACES = (
    "in the jungle",
    "in the snow",
    "on the beach",
    "on a cobblestone street",
    "on top of pink fabric",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "with a blue house in the background",
    "on top of a purple rug in a forest",
)
OF_OBJECTS = (
    "with a wheat field in the background",
    "with a tree and autumn leaves in the background",
    "with the Eiffel Tower in the background",
    "floating on top of water",
    "floating in an ocean of milk",
    "on top of green grass with sunflowers around it",
    "on top of a mirror",
    "on top of the sidewalk in a crowded street",
    "on top of a dirt road",
    "on top of a white rug",
)
OF_LIVE = (
    "wearing a red hat",
    "wearing a santa hat",
    "wearing a rainbow scarf",
    "wearing a black top hat and a monocle",
    "in a chef outfit",
    "in a firefighter outfit",
    "in a police outfit",
    "wearing pink glasses",
    "wearing a yellow shirt",
    "in a purple wizard outfit",
)
LOOKS = ("red", "purple", "shiny", "wet", "cube shaped")


@dataclasses.dataclass(frozen=True)
class Concept:
    """A thing that a model is to learn from photographs.

    Attributes:
      name: name in tables.
      class_name: noun for what it is.
      live: True for animals and people, whose prompts are about clothes.
      photographs: squares of one size.
      credit: line that pictures of them come with; "" for none.
    """

    name: str
    class_name: str
    live: bool
    photographs: Photographs
    credit: str = ""


def prompts(token: str, class_name: str, live: bool = False) -> tuple[str, ...]:
    """Returns the 25 prompts of a subject.

    Args:
      token: word that stands for it; "" for its class alone.

    >>> own = prompts("sks", "dog", live=True)
    >>> len(own), own[10], own[-1]
    (25, 'a sks dog wearing a red hat', 'a cube shaped sks dog')
    """
    subject = f"{token} {class_name}".strip()
    scenes = (*PLACES, *(OF_LIVE if live else OF_OBJECTS))
    return (
        *(f"a {subject} {scene}" for scene in scenes),
        *(f"a {look} {subject}" for look in LOOKS),
    )


def load(
    name: str,
    data_dir: Path,
    size: int,
    seed: int = 0,
    class_name: str | None = None,
    live: bool | None = None,
) -> Concept:
    """Loads one of the 30 subjects, or any folder of photographs.

    Args:
      name: a subject, whose photographs are in `data_dir/dreambooth/NAME` or, in a
        clone of the set's repository, in `data_dir/dreambooth/dataset/NAME`; or a
        folder.
      size: side of the squares in pixels.
      seed: decides the crops.
      class_name: noun for a folder's content; overrides that of a subject.
      live: as in `Concept`; None for a subject's own, and for False.

    Raises:
      ValueError: there is no such subject or folder, or a folder comes without its
        class.
      FileNotFoundError: photographs are missing; says where they are.
      CorruptImageError: a photograph cannot be decoded.
    """
    if name in SUBJECTS:
        folder = _folder(at_home(data_dir), name)
        usual, credit = CLASSES.get(name, name), CREDIT
    else:
        folder, usual, credit = at_home(name), None, ""
        if not folder.exists():
            text = unknown("subject or folder", name, SUBJECTS, HELP)
            raise ValueError(f"--subject: {text}")
    named = class_name or usual
    if named is None:
        raise ValueError(
            f"--subject {name}: expected --class_name, a noun for what the photographs "
            "show, such as dog."
        )
    lives = name in LIVE if live is None else live
    found = photographs.read(folder, size, seed)
    title = name if usual else folder.absolute().name
    return Concept(title, named, lives, found, credit)


def _folder(data_dir: Path, name: str) -> Path:
    root = data_dir / "dreambooth"
    places = root / name, root / "dataset" / name
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"There is no {places[0]}: git clone {SITE} {root} (CC BY 4.0), or give "
        "another --data_dir, or a folder of photographs with --subject and "
        "--class_name."
    )
