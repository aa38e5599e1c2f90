"""Emoji of a package, and the captions and pictures that the toy is trained on."""

import numpy as np
import pytest
import small_emoji

from experiments.tasks import emoji, emoji_captions
from experiments.tasks.emoji_captions import COLOURS, SCENES, WHITE


@pytest.fixture
def found(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "COUNT", len(small_emoji.NAMES) - 1)
    return emoji.read(small_emoji.package(tmp_path))


def test_reading(found):
    by_name = {one.name: one for one in found}
    assert "pale" not in by_name  # a swatch of a skin tone
    assert [one.name for one in found if one.unseen] == [
        "crying cat face",
        "purple heart",
    ]
    flag, cat = by_name["france flag"], by_name["crying cat face"]
    assert (flag.short, flag.category) == ("flag fr", "Flags")
    assert (cat.family, cat.subcategory) == ("cat_face", "cat-face")


def test_pictures_are_halved_and_laid_on_colours(found):
    pictures = emoji.pictures(found[:2])
    assert pictures.shape == (2, 32, 32, 4) and pictures.dtype == np.float32
    drawn = emoji.on(pictures, WHITE)
    assert drawn[0, 0, 0].tolist() == [255, 255, 255]
    assert drawn[1, 16, 16].tolist() == [10, 100, 200]
    red = emoji.on(pictures, COLOURS["red"])
    assert red[1, 0, 0].tolist() == list(COLOURS["red"])


def test_examples_show_what_their_captions_say(found):
    drawn = [one for one in found if not one.unseen]
    album = emoji_captions.album(found, drawn)
    rng = np.random.default_rng(0)
    dog, captions = 0, []
    for _ in range(400):
        picture, caption = album.example(dog, rng)
        captions.append(caption)
        corner, centre = picture[0, 0].tolist(), picture[20, 16].tolist()
        assert centre == [0, 100, 200]
        if caption.endswith("background") and "on a" in caption:
            colour = caption.split()[-2]
            assert corner == list(COLOURS[colour])
            assert not emoji_captions.withheld(drawn[dog], colour)
        else:
            assert corner == [255, 255, 255]
        assert not any(
            caption.endswith(scene) and emoji_captions.withheld(drawn[dog], scene)
            for scene in SCENES
        )
    empty = captions.count("") / len(captions)
    assert 0.06 < empty < 0.14  # one in ten
    assert {"dog face", "a picture of dog face", "dog face, animal mammal"} <= {
        *captions
    }
    assert any(one.startswith("a <spare") for one in captions)
    assert any(one.endswith(tuple(SCENES)) for one in captions)


def test_scenes_are_behind_smaller_subjects(found):
    album = emoji_captions.album(found, found[:1])
    scene = "on the beach"
    picture = album.before(scene, album.small[0])
    behind = emoji.on(album.scenes[scene], WHITE)
    assert picture[20, 16].tolist() == [0, 100, 200]
    assert (picture[:10] == behind[:10]).all()
    # 22 of 32 pixels: the square of 16 pixels has 11, those at its edge mixed.
    assert 9 <= (picture[20] == [0, 100, 200]).all(-1).sum() <= 11


def test_only_harmless_pictures_are_mirrored(found):
    mirrored = {one.name for one in found if emoji_captions.mirrored(one)}
    assert {"dog face", "purple heart"} <= mirrored
    assert not {"left arrow", "france flag"} & mirrored


def test_what_is_wrong_with_a_package_is_said(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="npm pack emoji-datasource-twitter"):
        emoji.read(tmp_path)
    folder = small_emoji.package(tmp_path / "package")
    with pytest.raises(ValueError, match=r"14 emoji .* expected 1906"):
        emoji.read(folder)
    monkeypatch.setattr(emoji, "COUNT", len(small_emoji.NAMES) - 1)
    (folder / emoji.IMAGES / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1\.png is damaged"):
        emoji.pictures(emoji.read(folder))
    (folder / "emoji.json").write_text("{", "utf-8")
    with pytest.raises(ValueError, match="is damaged"):
        emoji.read(folder)
