"""Photographs as squares: turned, resized, cropped once; none is lost by batches."""

import numpy as np
import pytest
from PIL import ExifTags, Image

from experiments.data import photographs, pipeline
from experiments.data.photographs import Repeated
from experiments.data.source import CorruptImageError


def ramp(height, width):
    """An image whose red is its column and whose green is its row."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([columns, rows, np.zeros_like(rows)], -1)


def test_a_square_is_a_crop_of_pillows_resized_image_drawn_once(tmp_path):
    Image.fromarray(ramp(60, 90)).save(tmp_path / "b.png")
    Image.fromarray(ramp(90, 60)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("not a photograph", "utf-8")
    found = photographs.read(tmp_path, 20, seed=3)
    assert found.names == ("a.png", "b.png") and found.images.shape == (2, 20, 20, 3)
    assert found.images.dtype == np.uint8 and "1 .txt" in found.notes[0]
    wide = np.asarray(Image.fromarray(ramp(60, 90)).resize((30, 20), Image.BILINEAR))
    crops = [wide[:, left : left + 20] for left in range(11)]
    assert sum(np.array_equal(found.images[1], crop) for crop in crops) == 1
    again, other = (photographs.read(tmp_path, 20, seed=s) for s in (3, 4))
    np.testing.assert_array_equal(again.images, found.images)
    assert (other.images != found.images).any()
    np.testing.assert_array_equal(found.centres[1], wide[:, 5:25])
    np.testing.assert_array_equal(other.centres, found.centres)
    assert found.fingerprint["photographs"] == 2
    assert found.fingerprint != other.fingerprint


def test_photographs_stand_as_viewers_show_them_and_grey_ones_get_colours(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    upright = ramp(40, 40)
    turned = Image.fromarray(np.rot90(upright).copy())
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(upright[..., 0]).save(tmp_path / "grey.png")
    found = photographs.read(tmp_path, 40)
    np.testing.assert_array_equal(found.images[1], upright)
    np.testing.assert_array_equal(found.images[0], upright[..., :1].repeat(3, 2))


def test_what_is_no_folder_of_photographs_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        photographs.read(tmp_path / "nowhere", 8)
    (tmp_path / "text.txt").write_text("", "utf-8")
    with pytest.raises(FileNotFoundError, match=r"no photographs .*left out 1 \.txt"):
        photographs.read(tmp_path, 8)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff half a photograph")
    with pytest.raises(CorruptImageError, match=r"broken\.jpg"):
        photographs.read(tmp_path, 8)


class Value:
    evaluated = 4

    def prepare(self, example, rng):
        return {"value": np.asarray(example["value"])}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_every_photograph_is_seen_as_often_as_any_other(count):
    source = Repeated.filling([{"value": i} for i in range(count)], 4)
    assert len(source) % 4 == 0 and len(source) == np.lcm(count, 4)
    stream = pipeline.training(source, Value(), batch=4, epochs=2, seed=0)
    seen = np.concatenate([batch["value"] for batch in stream])
    assert np.bincount(seen).tolist() == [2 * len(source) // count] * count
