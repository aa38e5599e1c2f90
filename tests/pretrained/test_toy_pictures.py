"""The toy's sheet of pictures, and its check by the probe."""

from pathlib import Path

import numpy as np
import pytest
import small_emoji
from PIL import Image

from experiments import files
from experiments.pretrained import emoji_probe, toy_check, toy_pictures, toy_sd3
from experiments.pretrained.emoji_probe import Probe
from experiments.pretrained.toy_pictures import NEW, TRAINED
from experiments.tasks import emoji
from experiments.tasks.emoji import Emoji
from experiments.tasks.emoji_captions import COLOURS, SCENES, withheld

# Emoji that the new prompts with a place are about, by their word there.
ABOUT = {
    "dog": ("dog", "dog face"),
    "teapot": ("teapot",),
    "guitar": ("guitar",),
    "penguin": ("penguin",),
    "frog": ("frog face",),
    "rocket": ("rocket",),
    "boot": ("womans boots", "hiking boot"),
}


class Stub:
    """Pipeline whose pictures have the colour that stands for a prompt."""

    def __init__(self, colour):
        self.colour = colour
        self.prompts = []

    def __call__(self, prompts, **options):
        assert options["size"] == 32
        self.prompts += prompts
        pixels = [np.full((32, 32, 3), self.colour(prompt)) for prompt in prompts]
        return np.stack(pixels).astype(np.uint8)


def test_the_sheet(tmp_path):
    pipeline = Stub(lambda prompt: len(prompt))
    toy_pictures.sheet(pipeline, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 8 * 32
    assert pipeline.prompts == [*TRAINED, *NEW]


def test_new_prompts_were_not_drawn_in_training():
    assert {*emoji.UNSEEN} <= {*NEW} and not {*emoji.UNSEEN} & {*TRAINED}
    with_place = [prompt for prompt in NEW if {*prompt.split()} & {*ABOUT}]
    assert len(with_place) == len(ABOUT)
    for prompt in with_place:
        places = [
            place
            for place in (*COLOURS, *SCENES)
            if prompt.endswith((f"a {place} background", f" {place}"))
        ]
        (subject,) = {*prompt.split()} & {*ABOUT}
        for name in ABOUT[subject]:
            one = Emoji(name, "", "", "", Path(), None)
            assert [withheld(one, place) for place in places] == [True], prompt


@pytest.mark.parametrize(("right", "accepted"), [(12, True), (6, True), (5, False)])
def test_the_check_counts_recognised_pictures(tmp_path, monkeypatch, right, accepted):
    monkeypatch.setattr(emoji, "COUNT", len(small_emoji.NAMES) - 1)
    package = small_emoji.package(tmp_path / "package")
    seen = [one for one in emoji.read(package) if not one.unseen]
    names = sorted({one.subcategory for one in seen})
    # Real pictures have an own colour each: the stub's feature is the subcategory.
    colours = {small_emoji.colour(one.name): one.subcategory for one in seen}
    of_name = {one.name: small_emoji.colour(one.name) for one in seen}
    wrong = [one.name for one in seen[right:]]
    assert "france flag" not in wrong  # what the probe takes them for

    def features(vit, pictures):
        centres = [tuple(map(int, picture[16, 16])) for picture in pictures]
        found = [names.index(colours[c]) if c in colours else -1 for c in centres]
        return np.stack([np.eye(len(names) + 1)[i] for i in found])

    weight = np.eye(len(names) + 1)[:, : len(names)].astype(np.float32)
    weight[-1, names.index("country-flag")] = 1  # what is no emoji is taken for a flag
    probe = Probe(tuple(names), weight, np.zeros(len(names)))
    pipeline = Stub(lambda name: (0, 0, 0) if name in wrong else of_name[name])
    monkeypatch.setattr(emoji_probe, "vit", lambda: None)
    monkeypatch.setattr(emoji_probe, "load", lambda: (probe, {"cross_validated": 0.5}))
    monkeypatch.setattr(emoji_probe, "features", features)
    monkeypatch.setattr(toy_sd3, "load", lambda path: pipeline)
    out = tmp_path / "results" / "check.json"
    toy_check.main([f"--emoji={package}", f"--out={out}"])
    found = files.read(out)
    assert found["drawn"] == round(right / 12, 4)
    assert (found["real"], found["pictures"]) == (1.0, 12)
    assert found["accepted"] == accepted
