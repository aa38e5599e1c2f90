"""DreamBooth's table of subjects and prompts, and folders of one's own."""

import numpy as np
import pytest
from PIL import Image

from experiments.tasks import dreambooth


def photograph(folder, name="00.jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)
    Image.fromarray(image).save(folder / name)


def test_there_are_30_subjects_nine_of_them_live():
    subjects = dreambooth.SUBJECTS
    assert len(subjects) == 30 and "dog4" not in subjects
    assert len(dreambooth.LIVE) == 9 and set(dreambooth.LIVE) < set(subjects)
    assert set(dreambooth.CLASSES) < set(subjects)
    classes = {dreambooth.CLASSES.get(name, name) for name in subjects}
    assert classes == {
        *("backpack", "stuffed animal", "bowl", "can", "candle", "cat", "clock"),
        *("sneaker", "dog", "toy", "boot", "glasses", "cartoon", "teapot", "vase"),
    }
    live = {dreambooth.CLASSES.get(name, name) for name in dreambooth.LIVE}
    assert live == {"cat", "dog"}


@pytest.mark.parametrize("live", [False, True])
def test_there_are_25_prompts_of_a_kind(live):
    found = dreambooth.prompts("sks", "toy", live)
    assert len(set(found)) == 25 and all("sks toy" in prompt for prompt in found)
    assert sum("wearing" in p or "outfit" in p for p in found) == 10 * live
    assert "a sks toy with the Eiffel Tower in the background" in found or live
    bare = dreambooth.prompts("", "toy", live)
    assert bare == tuple(p.replace("sks ", "") for p in found)


def test_subjects_are_found_in_a_copy_and_in_a_clone_of_the_set(tmp_path):
    for root in ("dreambooth", "dreambooth/dataset"):
        photograph(tmp_path / root / "dog2")
        found = dreambooth.load("dog2", tmp_path, 8)
        assert (found.name, found.class_name, found.live) == ("dog2", "dog", True)
        assert len(found.photographs) == 1 and "CC BY 4.0" in found.credit
        (tmp_path / "dreambooth").rename(tmp_path / f"{len(root)}")
    with pytest.raises(FileNotFoundError, match=f"git clone {dreambooth.SITE}"):
        dreambooth.load("dog2", tmp_path, 8)


def test_a_folder_needs_its_class(tmp_path):
    photograph(tmp_path / "mug")
    found = dreambooth.load(str(tmp_path / "mug"), tmp_path, 8, class_name="cup")
    assert (found.name, found.class_name, found.live) == ("mug", "cup", False)
    assert not found.credit
    with pytest.raises(ValueError, match="expected --class_name"):
        dreambooth.load(str(tmp_path / "mug"), tmp_path, 8)
    with pytest.raises(ValueError, match="did you mean teapot"):
        dreambooth.load("teapott", tmp_path, 8)
