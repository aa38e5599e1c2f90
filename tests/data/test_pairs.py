"""Images with masks: folders, lists, splits, and what is refused or counted."""

import io
import pickle

import masks
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from experiments.data import fingerprint, pair_check, pairs, segmentation_task
from experiments.data.pairs import UnfitMaskError
from experiments.data.source import CorruptImageError

TEN = [f"p{i}" for i in range(10)]


def names(source):
    return [own.name for own in source.files]


def said_of(task, **options):
    console = Console(file=io.StringIO(), width=60)
    return pair_check.checked(task, console, **options), console.file.getvalue()


@pytest.fixture
def ten(tmp_path):
    return masks.draw(tmp_path / "ten", TEN)


@pytest.fixture
def listed(ten):
    return masks.lists(ten, train=TEN[:7], val=TEN[7:8], test=TEN[8:])


# Pixels


def test_a_pair_is_what_its_files_hold(ten):
    source = pairs.read(ten).whole()
    assert len(source) == 10
    for index, size in ((0, (20, 28)), (1, (28, 20))):
        image, mask = masks.pair((0, index), size)
        found = source[index]
        assert found["name"] == f"p{index}" and found["mask"].dtype == np.uint8
        np.testing.assert_array_equal(found["image"], image)
        np.testing.assert_array_equal(found["mask"], mask // 255)


GREYS = np.array([[0, 127], [128, 255]], np.uint8)
COLOURS = np.repeat(GREYS[..., None], 3, 2)


@pytest.mark.parametrize(
    ("picture", "suffix"),
    [
        (Image.fromarray(GREYS), "png"),
        (Image.fromarray(GREYS), "tif"),
        (Image.fromarray(COLOURS), "bmp"),
        (Image.fromarray(COLOURS).convert("RGBA"), "png"),
        (Image.fromarray(GREYS).convert("P"), "gif"),
        (Image.fromarray(GREYS > 127), "png"),
    ],
)
def test_masks_of_any_kind_are_cut_at_127(tmp_path, picture, suffix):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    Image.fromarray(GREYS).save(tmp_path / "images" / "a.png")
    picture.save(tmp_path / "masks" / f"a.{suffix}")
    found = pairs.read(tmp_path).whole()[0]
    assert found["mask"].tolist() == [[0, 0], [1, 1]]
    np.testing.assert_array_equal(found["image"], COLOURS)


def test_image_and_mask_are_upright(tmp_path):
    image, mask = masks.pair(0, (20, 28))
    tags = Image.Exif()
    tags[0x0112] = 8
    for kind, array in (("images", image), ("masks", mask)):
        (tmp_path / kind).mkdir()
        Image.fromarray(array).save(tmp_path / kind / "a.png", exif=tags)
    found = pairs.read(tmp_path).whole()[0]
    np.testing.assert_array_equal(found["image"], np.rot90(image))
    np.testing.assert_array_equal(found["mask"], np.rot90(mask) // 255)


def test_a_source_travels_to_worker_processes(ten):
    source = segmentation_task.load(ten).train
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[1]["mask"], source[1]["mask"])
    error = UnfitMaskError("a.png", "m.png", (2, 3), (3, 2))
    same = pickle.loads(pickle.dumps(error))
    expected = "m.png has 2 x 3 pixels, its image a.png 3 x 2"
    assert type(same) is UnfitMaskError and str(same) == expected


# Layouts


def test_lists_say_what_is_in_a_split(listed):
    task = segmentation_task.load(listed)
    assert task.name == "ten" and task.notes == ()
    parts = task.train, task.validation, task.test
    assert [names(part) for part in parts] == [TEN[:7], TEN[7:8], TEN[8:]]
    assert len(task.full) == 8 and task.full[7]["name"] == "p7"


def test_names_of_lists_may_have_endings_and_folders(ten):
    lines = ["p3.png", "images/p1.jpg", "p0"]
    masks.draw(ten, ["v1.5"])
    masks.lists(ten, train=lines, test=["v1.5", "p9"])
    task = segmentation_task.load(ten, 0.4)
    assert {*names(task.train), *names(task.validation)} == {"p3", "p1", "p0"}
    assert names(task.test) == ["v1.5", "p9"]


def test_a_list_val_alone_is_the_test(ten):
    masks.lists(ten, train=TEN[:8], val=TEN[8:])
    task = segmentation_task.load(ten)
    assert names(task.test) == TEN[8:]
    assert [len(task.train), len(task.validation)] == [7, 1]
    assert task.notes == (f"{ten}: val.txt is the test, there is no test.txt",)


def test_what_is_held_out_is_a_share_and_the_same_each_time(ten):
    masks.lists(ten, train=TEN, test=["t"])
    masks.draw(ten, ["t"])
    half, again, tenth = (segmentation_task.load(ten, x) for x in (0.5, 0.5, 0.1))
    assert names(half.validation) == names(again.validation)
    assert len(half.validation) == 5 and len(tenth.validation) == 1
    both = [*names(half.train), *names(half.validation)]
    assert sorted(both) == sorted(TEN)
    with pytest.raises(ValueError, match=r"validation=1.0: expected a share between"):
        segmentation_task.load(ten, 1.0)


def test_a_single_folder_is_split_and_says_so(ten):
    task = segmentation_task.load(ten)
    sizes = [len(part) for part in (task.train, task.validation, task.test)]
    assert sizes == [7, 1, 2]
    parts = task.train, task.validation, task.test
    assert sorted(name for part in parts for name in names(part)) == TEN
    assert task.notes == (f"{ten}: a fifth of the pairs, seeded, are the test",)
    whole = segmentation_task.as_test(ten)
    assert names(whole.test) == TEN and not len(whole.train)


def test_folders_of_splits(tmp_path):
    for part, kinds in (("train", ("image", "mask")), ("test", ("images", "masks"))):
        masks.draw(tmp_path / part, TEN[:4], kinds=kinds, seed=len(part))
    task = segmentation_task.load(tmp_path, name="mine")
    assert task.name == "mine" and names(task.test) == TEN[:4]
    assert [len(task.train), len(task.validation)] == [3, 1]
    masks.draw(tmp_path / "val", ["v"], seed=9)
    task = segmentation_task.load(tmp_path)
    assert names(task.validation) == ["v"] and len(task.train) == 4


def test_pranets_folders(tmp_path):
    """Names may be the same in several sets; in a split of one they are told."""
    masks.draw(tmp_path / "TrainDataset", [*TEN[1:], "q"], kinds=("image", "mask"))
    for seed, name in enumerate(("CVC-300", "CVC-ClinicDB", "Kvasir"), start=1):
        masks.draw(tmp_path / "TestDataset" / name, TEN[:2], seed)
    task = segmentation_task.load(tmp_path)
    assert len(task.train) == 9 and len(task.test) == 4
    assert list(task.extra_tests) == ["CVC-300", "CVC-ClinicDB", "Kvasir"]
    assert task.test[2]["name"] == "p0"
    np.testing.assert_array_equal(
        task.test[2]["image"], task.extra_tests["Kvasir"][0]["image"]
    )
    checked, said = said_of(task)
    assert list(checked.fingerprint) == [
        *("train", "validation", "test", "CVC-300", "CVC-ClinicDB", "Kvasir")
    ]
    assert " ".join(said.split()).endswith(
        "test: 2 names are in the training split, too, with other pixels (p1, p1)"
    )
    (tmp_path / "TestDataset" / "Kvasir").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="has no pairs of Kvasir: expected a"):
        segmentation_task.load(tmp_path)


# What is refused


def remove(path):
    path.unlink()


def double(path):
    Image.new("L", (5, 5)).save(path.with_suffix(".bmp"))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "masks/p4.png",
            remove,
            r"ten: no partner of .* 1 of the files: .*images/p4.png",
        ),
        ("images/p4.png", remove, r"no partner of .*masks/p4.png\."),
        ("masks/p4.png", double, r"masks has p4.bmp and p4.png: expected one file"),
    ],
)
def test_pairs_that_are_none(listed, file, change, message):
    change(listed / file)
    with pytest.raises(ValueError, match=message):
        segmentation_task.load(listed)
    for split in ("train", "val", "test"):
        (listed / f"{split}.txt").unlink()
    with pytest.raises(ValueError, match=message):
        segmentation_task.load(listed)


def test_a_file_without_a_partner_that_no_list_has_does_not_matter(listed):
    Image.new("L", (5, 5)).save(listed / "masks" / "other.png")
    (listed / "images" / "notes.txt").touch()
    task = segmentation_task.load(listed)
    assert len(task.full) == 8 and task.notes == (f"{listed}: left out 1 .txt",)


@pytest.mark.parametrize(
    ("lists", "error", "message"),
    [
        ({"test": ["p0", "p9"]}, ValueError, r"ten: .*images/p0.png is in two splits"),
        ({"val": ["p9"]}, ValueError, r"images/p9.png is in two splits"),
        ({"train": ["p0", "p1", "p0"]}, ValueError, r"train.txt lists p0 more than on"),
        ({"test": [""]}, ValueError, r"test.txt is empty"),
        ({"test": ["x", "p9"]}, FileNotFoundError, r"test.txt: 1 of 2 pairs are miss"),
    ],
)
def test_lists_that_cannot_be(listed, lists, error, message):
    masks.lists(listed, **lists)
    with pytest.raises(error, match=message):
        segmentation_task.load(listed)


def test_a_few_missing_names_are_counted_and_named(listed):
    masks.draw(listed, [f"q{i}" for i in range(13)])
    masks.lists(listed, train=[*TEN[:7], *(f"q{i}" for i in range(13)), "gone", "lost"])
    task = segmentation_task.load(listed)
    note = f"{listed / 'train.txt'}: 2 of 22 pairs are missing in {listed}: gone, lost"
    assert len(task.train) == 20 and task.notes == (note,)
    (listed / "test.txt").unlink()
    (listed / "val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"The list .*val.txt is missing"):
        segmentation_task.load(listed)


def test_folders_without_images_with_masks(tmp_path, ten):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"no images with masks: expected "):
            segmentation_task.load(path)
    assert segmentation_task.is_folder(ten) and not segmentation_task.is_folder(
        tmp_path
    )
    masks.draw(tmp_path / "one", ["a"])
    with pytest.raises(ValueError, match="has 1 pair to train on and nothing held out"):
        segmentation_task.load(tmp_path / "one")
    for name in ("images", "masks"):
        (tmp_path / "empty" / name).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="have no two images of one name"):
        segmentation_task.load(tmp_path / "empty")


# What is looked at


def test_a_fingerprint_is_that_of_images_and_masks(listed):
    before = said_of(segmentation_task.load(listed))[0].fingerprint
    assert before["train"]["images"] == 7 and before["test"]["images"] == 2
    path = listed / "masks" / "p8.png"
    mask = np.array(Image.open(path))
    mask[0, 0] = 255 - mask[0, 0]
    Image.fromarray(mask).save(path)
    after = said_of(segmentation_task.load(listed))[0].fingerprint
    assert after["train"] == before["train"]
    weights = {"classes": 2, "weights": {}}
    (text,) = fingerprint.differences(
        {"data": before, **weights}, {"data": after, **weights}
    )
    assert text == "the data of test differ (other images or labels)"


def test_sizes_that_do_not_fit_and_files_that_are_broken(listed):
    Image.new("L", (5, 9), 255).save(listed / "masks" / "p2.png")
    (listed / "images" / "p3.png").write_bytes(b"no image")
    (listed / "masks" / "p4.png").write_bytes(b"")
    task = segmentation_task.load(listed)
    with pytest.raises(UnfitMaskError, match=r"p2.png has 5 x 9 pixels, its .*24 x 24"):
        task.train[2]
    with pytest.raises(CorruptImageError, match=r"image 4 .*masks/p4.png.* is empty"):
        task.train[4]
    with pytest.raises(ValueError, match=r"ten, train: 3 of 7 images are corrupt") as e:
        said_of(task)
    assert all(f"/{name}.png" in str(e.value) for name in ("p2", "p3", "p4"))
    kept, said = said_of(task, skip_corrupt=True)
    assert "ten, train: 3 corrupt images of 7 left out" in said
    found = [kept.train[i]["name"] for i in range(len(kept.train))]
    assert (
        found == ["p0", "p1", "p5", "p6"] and kept.fingerprint["train"]["images"] == 4
    )
    (listed / "masks" / "p5.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"ten: 1 files cannot be read:\n.*p5"):
        said_of(task)


def blank(path):
    with Image.open(path) as image:
        size = image.size
    Image.new("L", size).save(path)


def test_empty_masks_are_counted_and_nothing_but_these_is_an_error(listed):
    for name in ("p1", "p8"):
        blank(listed / "masks" / f"{name}.png")
    _, said = said_of(segmentation_task.load(listed))
    assert said.split("\n")[-3:-1] == [
        "ten, train: 1 of 7 masks are empty (p1)",
        "ten, test: 1 of 2 masks are empty (p8)",
    ]
    blank(listed / "masks" / "p9.png")
    with pytest.raises(ValueError, match=r"ten, test: none of 2 masks has any foregro"):
        said_of(segmentation_task.load(listed))


def test_images_that_are_in_two_splits_under_other_names_are_counted(listed):
    for one, other in (("p1", "p7"), ("p2", "p8"), ("p2", "p9")):
        for kind in ("images", "masks"):
            data = (listed / kind / f"{one}.png").read_bytes()
            (listed / kind / f"{other}.png").write_bytes(data)
    blank(listed / "masks" / "p8.png")  # the image alone counts
    _, said = said_of(segmentation_task.load(listed))
    of, also = "ten, validation: 1 images", "ten, test: 2 images"
    rest = "are in the training split, too"
    assert f"{of} {rest} (p7 is p1)\n" in said
    assert f"{also} {rest} (p8 is p2, p9 is p2)\n" in said


def test_tests_that_are_validation_images_are_counted(listed):
    """Which are trained on in the end, or chosen by."""
    for kind in ("images", "masks"):
        data = (listed / kind / "p7.png").read_bytes()
        (listed / kind / "p9.png").write_bytes(data)
    _, said = said_of(segmentation_task.load(listed))
    (line,) = (line for line in said.splitlines() if "split" in line)
    assert line == "ten, test: 1 images are in the validation split, too (p9 is p7)"


def test_a_test_alone_is_looked_at_and_trains_nothing(ten):
    task, _ = said_of(segmentation_task.test_only(ten))
    assert list(task.fingerprint) == ["test"] and len(task.test) == 10
    with pytest.raises(ValueError, match="ten has no training images: it is a test of"):
        pair_check.require_training(task)
