"""Pictures in files: read as they were drawn; what is missing or damaged is named."""

import numpy as np
import pytest
from PIL import Image

from experiments.files import MismatchError
from experiments.training import pictures

DRAWN = np.random.default_rng(0).integers(0, 255, (2, 3, 4, 6, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    for prompt, number in np.ndindex(2, 3):
        file = pictures.path(tmp_path, prompt, number)
        Image.fromarray(DRAWN[prompt, number]).save(file)
    return tmp_path


def test_pictures_are_read_by_prompt_and_number(folder):
    np.testing.assert_array_equal(pictures.read(folder, 2, 3), DRAWN)
    with pytest.raises(FileNotFoundError, match=r"02_00\.png"):
        pictures.read(folder, 3, 3)
    Image.fromarray(DRAWN[0, 0, :2]).save(pictures.path(folder, 1, 1))
    with pytest.raises(MismatchError, match="pictures of several sizes"):
        pictures.read(folder, 2, 3)


@pytest.mark.parametrize("left", [0, 4, 40, -60])
def test_a_damaged_picture_is_named(left, folder):
    file = pictures.path(folder, 1, 2)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(MismatchError, match=r"01_02\.png is damaged, delete it"):
        pictures.read(folder, 2, 3)
