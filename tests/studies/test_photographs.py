"""Masks of photographs by boxes, as a command."""

import json

import numpy as np
import pytest
import tiny_sams
from PIL import Image

from experiments.studies import photographs
from snella_jax.models import sam


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "a [b].png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def words(photo, box, out):
    model = f"--model={tiny_sams.FILES['vit']}"
    return [f"--photos={photo}", f"--boxes={box}", model, "--sizes=32", f"--out={out}"]


def test_masks_are_those_of_segment(photo, tmp_path):
    out = tmp_path / "out"
    photographs.main(words(photo, "5,5,50,30", out))
    [row] = json.loads((out / "photographs.json").read_text("utf-8"))["rows"]
    model = sam.load(tiny_sams.FILES["vit"], image_size=32)
    with Image.open(photo) as image:
        pixels = np.asarray(image)
    masks, iou = sam.segment(model, pixels, boxes=(5, 5, 50, 30))
    assert row["masks"][0]["share"] == masks[0].mean()
    assert row["masks"][0]["iou"] == pytest.approx(float(iou[0]))
    assert row["size"] == [60, 40]
    with Image.open(out / "photographs.png") as figure:
        assert figure.width > 300


def test_a_turned_photograph_is_upright(tmp_path):
    """As phones write portraits: pixels on their side, and a mark that says so."""
    exif, path = Image.Exif(), tmp_path / "portrait.jpg"
    exif[0x0112] = 6  # a quarter turn
    Image.new("L", (60, 40)).save(path, exif=exif)
    assert photographs._pixels(path).shape == (60, 40, 3)


@pytest.mark.parametrize("box", ["5,5,50", "5,5,61,30", "50,5,5,30", "a,b,c,d"])
def test_a_box_that_cannot_be(photo, tmp_path, box):
    with pytest.raises(SystemExit, match="expected x0,y0,x1,y1"):
        photographs.main(words(photo, box, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
