"""Which files of a class folder are images, and the pixels that come of them."""

import io
import os

import numpy as np
import pytest
from PIL import Image, ImageOps
from rich.console import Console

from experiments.data import check, folders, tfds
from experiments.data.source import CorruptImageError, Files, decoding, pixels_of
from experiments.tasks import vtab

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (4, 7, 3), np.uint8)


def decoded(data, name="x"):
    with decoding(data, name, 0) as image:
        return pixels_of(image)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(kind, orientation):
    """Pillow's own function, which is not used here, turns them alike."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = encoded(Image.fromarray(PIXELS), kind, exif=tags)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape[:2] == ((4, 7) if orientation < 5 else (7, 4))
    np.testing.assert_array_equal(decoded(data), expected)


def test_images_of_tfds_are_upright_too():
    tags = Image.Exif()
    tags[0x0112] = 3
    data = encoded(Image.fromarray(PIXELS), "PNG", exif=tags)
    builder = vtab.TASKS["dtd"].builder
    (example,) = tfds.TfdsSplit([{"image": data, "label": 5}], builder)
    np.testing.assert_array_equal(example["image"], PIXELS[::-1, ::-1])


def test_a_phones_photograph_by_hand(tmp_path):
    """Grey and lying on its left side: the camera's right is the top."""
    tags = Image.Exif()
    tags[0x0112] = 8
    Image.fromarray(PIXELS[..., 0]).save(tmp_path / "x.png", exif=tags)
    image = Files([tmp_path / "x.png"], np.zeros(1, int))[0]["image"]
    np.testing.assert_array_equal(image[..., 0], np.rot90(PIXELS[..., 0]))


@pytest.mark.parametrize(
    "tag", [b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\x77\0\0", b"?"]
)
def test_malformed_tags_turn_nothing(tag):
    data = encoded(Image.fromarray(PIXELS), "WEBP", lossless=True, exif=tag + b"\0" * 8)
    np.testing.assert_array_equal(decoded(data), PIXELS)


def test_transparency_is_dropped():
    """The colours stored below it show, even where nothing would."""
    clear = np.concatenate([PIXELS, np.zeros((4, 7, 1), np.uint8)], -1)
    data = encoded(Image.fromarray(clear), "PNG")
    np.testing.assert_array_equal(decoded(data), PIXELS)
    image = Image.fromarray(PIXELS).quantize(8)
    expected = np.asarray(image.getpalette(), np.uint8).reshape(-1, 3)
    expected = expected[np.asarray(image)]
    for transparency in (bytes([0, 128, 255]), 3):  # of which Pillow warns
        data = encoded(image, "PNG", transparency=transparency)
        np.testing.assert_array_equal(decoded(data), expected)


def test_kinds_of_pixels():
    grey, bits = PIXELS[..., 0], PIXELS[..., 0] > 127
    for kind in ("PNG", "TIFF", "PPM"):
        found = decoded(encoded(Image.fromarray(bits), kind))
        np.testing.assert_array_equal(found[..., 0], 255 * bits)
        found = decoded(encoded(Image.fromarray(grey), kind))
        np.testing.assert_array_equal(found[..., 0], grey)
    cmyk = Image.fromarray(np.full((8, 8, 4), (255, 0, 0, 0), np.uint8), "CMYK")
    found = decoded(encoded(cmyk, "JPEG", quality=100))
    assert np.abs(found.astype(int) - (0, 255, 255)).max() <= 3
    frames = [Image.fromarray(np.full_like(grey, value)) for value in (10, 200)]
    for kind in ("GIF", "TIFF", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decoded(data).min() == decoded(data).max() == 10  # the first


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("top", [255, 65535])  # also where all would fit
def test_grey_of_16_bits_is_refused(kind, top):
    deep = Image.fromarray(np.linspace(0, top, 28, dtype=np.uint16).reshape(4, 7))
    with pytest.raises(CorruptImageError, match=r"image 0 \(x\).* 8 bits a channel"):
        decoded(encoded(deep, kind))


def test_colour_of_16_bits_is_taken_at_its_upper_8():
    values = np.array([0x0100, 0x02FF, 0xFFFF], ">u2")
    strip = values.tobytes()
    header = b"II*\0\x08\0\0\0" + b"\x09\0"
    entries = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 3, 122), (259, 3, 1, 1)]
    entries += [(262, 3, 1, 2), (273, 4, 1, 128), (277, 3, 1, 3), (278, 3, 1, 1)]
    entries += [(279, 4, 1, 6)]
    rows = b"".join(
        tag.to_bytes(2, "little") + form.to_bytes(2, "little")
        + count.to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, form, count, value in entries
    )  # fmt: skip
    data = header + rows + bytes(4) + b"\x10\0\x10\0\x10\0"
    little = values.astype("<u2").tobytes()
    assert len(data) == 128 and len(strip) == len(little)
    assert decoded(data + little).ravel().tolist() == [1, 2, 255]


# Class folders


def save(path, kind=None, value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((5, 5), value, np.uint8)).save(path, kind)


@pytest.fixture
def pets(tmp_path):
    for part in ("train", "val", "test"):
        for kind in ("cat", "dog"):
            for i in range(2):
                save(tmp_path / "pets" / part / kind / f"{i}.png")
    return tmp_path / "pets"


def names(source):
    return [path.name for path in source.paths]


@pytest.mark.parametrize(
    "junk",
    [
        ".ipynb_checkpoints/0-checkpoint.png",
        "@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
        "__MACOSX/cat/._0.png",
        "._0.png",
        ".hidden.jpg",
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        "$RECYCLE.BIN/a.png",
    ],
)
def test_hidden_files_and_what_systems_leave_are_no_images(pets, junk):
    for place in ("train/cat", "test/dog", "val", "train"):  # also beside the classes
        save(pets / place / junk, "PNG")
    task = folders.load(pets)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [4, 4, 4]
    assert task.names == ("cat", "dog")
    said = dict(note.split(": ") for note in task.notes)
    assert said == {
        str(pets / "train"): "left out 2 hidden or the system's",
        str(pets / "val"): "left out 1 hidden or the system's",
        str(pets / "test"): "left out 1 hidden or the system's",
    }


def test_every_format_that_people_keep_is_read(pets):
    kinds = {
        ".GIF": "GIF",
        ".ppm": "PPM",
        ".pgm": "PPM",
        ".jfif": "JPEG",
        ".jpe": "JPEG",
    }
    kinds |= {".JPEG": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".Tif": "TIFF"}
    kinds |= {".tiff": "TIFF", ".avif": "AVIF", ".jp2": "JPEG2000", ".pbm": "PPM"}
    for suffix, kind in kinds.items():
        save(pets / "train/cat" / f"more{suffix}", kind)
    task = folders.load(pets)
    assert not task.notes
    found = check.checked(task, Console(quiet=True)).train
    assert len(found) == 4 + len(kinds)
    assert all(abs(int(found[i]["image"].mean()) - 90) < 3 for i in range(len(found)))


def test_what_is_left_out_is_counted(pets):
    for name in ("a.txt", "b.TXT", "Makefile", "c.heic", "below/d.txt"):
        (pets / "train/cat" / name).parent.mkdir(exist_ok=True)
        (pets / "train/cat" / name).touch()
    save(pets / "train/loose.png")
    save(pets / "train/cat/x.jpg/inside.png")  # a folder of that name
    (pets / "train/dog/nowhere").symlink_to(pets / "gone")
    os.mkfifo(pets / "train/dog/pipe.png")
    console = Console(file=io.StringIO(), width=60)
    task = check.checked(folders.load(pets), console)
    assert names(task.train) == ["0.png", "1.png", "inside.png", "0.png", "1.png"]
    said = console.file.getvalue()
    where, _, kinds = said.strip().partition(": left out ")
    assert where == str(pets / "train")
    first, *others = kinds.split(", ")
    assert first == "3 .txt"
    assert sorted(others) == [
        "1 .heic",
        "1 beside the class folders",
        "1 broken links",
        "1 no regular files",
        "1 without a suffix",
    ]


def test_many_kinds_are_not_all_named(pets):
    for i in range(20):
        (pets / "val/cat" / f"{i}.{i}").touch()
    (note,) = folders.load(pets).notes
    assert note.count(", ") == 8 and note.endswith(", 12 others")


def test_a_folder_that_cannot_be_read_is_counted(pets, monkeypatch):
    (pets / "test/cat/secret").mkdir()
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("secret"):
            raise PermissionError(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    note = f"{pets / 'test'}: left out 1 folders that cannot be read"
    assert folders.load(pets).notes == (note,)


def test_a_split_of_nothing_but_other_files(pets):
    for path in (pets / "val").rglob("*.png"):
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(ValueError, match=r"val has no images .*left out 4 \.heic\."):
        folders.load(pets)


def test_linked_folders_are_read_once(pets, tmp_path):
    """Wherever links lead, also to where they lie themselves."""
    for i in range(3):
        save(tmp_path / "elsewhere" / "deep" / f"more{i}.png")
    cat = pets / "train/cat"
    (cat / "a_link").symlink_to(tmp_path / "elsewhere")
    (cat / "b_link").symlink_to(tmp_path / "elsewhere/deep")
    (cat / "self").symlink_to(cat)
    (cat / "up").symlink_to(pets)
    (cat / "round").symlink_to("round")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "elsewhere")
    save(tmp_path / "emu/0.png")
    (pets / "train/emu").symlink_to(tmp_path / "emu")
    task = folders.load(pets)
    files = [path.resolve().name for path in task.train.paths]
    expected = ["0.png", "1.png", "more0.png", "more1.png", "more2.png"]
    assert sorted(files[:5]) == expected and files[5:] == ["0.png", "1.png", "0.png"]
    assert task.names == ("cat", "dog", "emu")
    kinds = "4 linked folders that were read already or lead back, 1 broken links"
    assert task.notes == (f"{pets / 'train'}: left out {kinds}",)


def test_links_between_splits_and_classes(pets):
    (pets / "train/cat/more").symlink_to(pets / "train/dog")
    note = f"{pets}: 2 files have several labels, first {pets / 'train/dog/0.png'}"
    assert folders.load(pets).notes == (note,)
    (pets / "train/cat/more").unlink()
    (pets / "train/cat/more").symlink_to(pets / "test/cat")
    with pytest.raises(ValueError, match=r"which is .*more/0\.png, is in two splits"):
        folders.load(pets)


def test_images_that_are_missing_or_empty_are_named(pets):
    (pets / "train/cat/gone.png").symlink_to(pets / "nowhere.png")
    (pets / "test/dog/round.png").symlink_to("round.png")
    (pets / "val/dog/empty.png").touch()
    task = folders.load(pets)
    with pytest.raises(OSError, match=r"2 files cannot be read(.|\n)*gone(.|\n)*round"):
        check.checked(task, Console(quiet=True), skip_corrupt=True)
    (pets / "train/cat/gone.png").unlink()
    (pets / "test/dog/round.png").unlink()
    task = folders.load(pets)
    with pytest.raises(
        ValueError, match=r"1 of 5 images are corrupt(.|\n)*file is empty"
    ):
        check.checked(task, Console(quiet=True))
    kept = check.checked(task, Console(quiet=True), skip_corrupt=True)
    assert len(kept.validation) == 4
