"""VTAB-1k's and FGVC's rules: splits by hand, labels by hand, TFDS's real schemas."""

import dataclasses
import io
import json
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from rich.console import Console
from tensorflow_datasets.proto import tf_example_pb2

from experiments.data import check, folders, source
from experiments.data.tfds import Part, TfdsSplit
from experiments.tasks import catalogue, fgvc, vtab


class Counted:
    """A split of so many examples; an example is its split and index."""

    def __init__(self, split, size):
        self.split, self.size = split, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"image": None, "label": (self.split, index)}


# The sizes of the splits, and by hand: where validation begins (200 examples each), and
# where the test examples begin and how many there are.
SIZES = {
    "caltech101": ({"train": 3059, "test": 6085}, ("train", 2753), ("test", 0, 6085)),
    "cifar100": ({"train": 50000, "test": 10000}, ("train", 45000), ("test", 0, 10000)),
    "dtd": (
        {"train": 1880, "validation": 1880, "test": 1880},
        ("validation", 0),
        ("test", 0, 1880),
    ),
    "oxford_flowers102": (
        {"train": 1020, "validation": 1020, "test": 6149},
        ("validation", 0),
        ("test", 0, 6149),
    ),
    "oxford_iiit_pet": (
        {"train": 3680, "test": 3669},
        ("train", 2944),
        ("test", 0, 3669),
    ),
    "svhn": ({"train": 73257, "test": 26032}, ("train", 65931), ("test", 0, 26032)),
    "sun397": (
        {"train": 76128, "validation": 10875, "test": 21750},
        ("validation", 0),
        ("test", 0, 21750),
    ),
    "patch_camelyon": (
        {"train": 262144, "validation": 32768, "test": 32768},
        ("validation", 0),
        ("test", 0, 32768),
    ),
    "eurosat": ({"train": 27000}, ("train", 16200), ("train", 21600, 5400)),
    "resisc45": ({"train": 31500}, ("train", 18900), ("train", 25200, 6300)),
    "diabetic_retinopathy": (
        {"train": 35126, "validation": 10906, "test": 42670},
        ("validation", 0),
        ("test", 0, 42670),
    ),
    "clevr_count": (
        {"train": 70000, "validation": 15000},
        ("train", 63000),
        ("validation", 0, 15000),
    ),
    "clevr_dist": (
        {"train": 70000, "validation": 15000},
        ("train", 63000),
        ("validation", 0, 15000),
    ),
    "dmlab": (
        {"train": 65550, "validation": 22628, "test": 22735},
        ("validation", 0),
        ("test", 0, 22735),
    ),
    "kitti_dist": (
        {"train": 6347, "validation": 423, "test": 711},
        ("validation", 0),
        ("test", 0, 711),
    ),
    "dsprites_loc": ({"train": 737280}, ("train", 589824), ("train", 663552, 73728)),
    "dsprites_ori": ({"train": 737280}, ("train", 589824), ("train", 663552, 73728)),
    "smallnorb_azi": (
        {"train": 24300, "test": 24300},
        ("test", 0),
        ("test", 12150, 12150),
    ),
    "smallnorb_ele": (
        {"train": 24300, "test": 24300},
        ("test", 0),
        ("test", 12150, 12150),
    ),
}


def test_there_are_nineteen_tasks_in_three_groups():
    assert SIZES.keys() == vtab.TASKS.keys()
    groups = [row.group for row in vtab.TASKS.values()]
    counts = [groups.count(group) for group in ("natural", "specialized", "structured")]
    assert counts == [7, 4, 8]


@pytest.mark.parametrize("name", SIZES)
def test_splits_of_vtab(name):
    sizes, (validation, begin), (test, first, count) = SIZES[name]
    sources = {split: Counted(split, size) for split, size in sizes.items()}
    assert set(vtab.splits(vtab.TASKS[name])) == sizes.keys()
    task = vtab.from_sources(name, sources)
    assert (len(task.train), len(task.validation), len(task.test)) == (800, 200, count)
    assert task.train[0]["label"] == ("train", 0)
    assert task.train[799]["label"] == ("train", 799)
    assert task.validation[0]["label"] == (validation, begin)
    assert task.validation[199]["label"] == (validation, begin + 199)
    assert task.test[0]["label"] == (test, first)
    assert task.test[count - 1]["label"] == (test, first + count - 1)
    full = [task.full[i]["label"] for i in range(1000)]
    assert full == [
        *(("train", i) for i in range(800)),
        *((validation, begin + i) for i in range(200)),
    ]


def test_what_is_held_out_is_pinned():
    """Tables compare runs on the same images."""
    held_out = source.split(Counted("train", 20), folders.VALIDATION_SEED, 2)[0]
    assert held_out.rows.tolist() == [4, 19]


def test_a_split_that_is_too_small():
    with pytest.raises(ValueError, match="has 50 examples, too few"):
        Part("train", (90,), 200).rows(50)


def objects(*depths, kinds=None):
    coordinates = np.array([[5.0, 7.0, depth] for depth in depths], np.float32)
    coordinates = coordinates.reshape(-1, 3)
    kinds = np.zeros(len(depths), np.int64) if kinds is None else np.array(kinds)
    return {
        "objects": {"pixel_coords": coordinates, "location": coordinates, "type": kinds}
    }


@pytest.mark.parametrize(
    ("depths", "label"),
    [
        ((3.0, 20.0), 0),
        ((8.0, 9.0), 0),  # a threshold itself belongs to the bin below
        ((np.nextafter(np.float32(8), np.float32(9)), 9.0), 1),
        ((8.5,), 1),
        ((8.6, 11.0), 2),
        ((9.0,), 2),
        ((9.4,), 3),
        ((9.5,), 3),
        ((10.0, 12.0), 4),
        ((10.1, 12.0, 11.0), 5),
    ],
)
def test_clevr_distance_at_its_thresholds(depths, label):
    assert vtab.clevr_distance(objects(*depths)) == label


def test_clevr_counts_from_three():
    counts = [vtab.clevr_count(objects(*[9.0] * number)) for number in range(3, 11)]
    assert counts == list(range(8))


@pytest.mark.parametrize(
    ("depths", "kinds", "label"),
    [
        ((), (), 3),  # nothing at all
        ((5.0, 30.0), (3, 7), 3),  # a pedestrian and something unknown
        ((5.0, 30.0), (3, 0), 2),  # the pedestrian is nearer, but no vehicle
        ((-3.0,), (1,), 0),
        ((8.0, 9.0), (0, 2), 0),
        ((8.1, 40.0), (2, 0), 1),
        ((20.0,), (0,), 1),
        ((20.1,), (0,), 2),
    ],
)
def test_kitti_distance_with_and_without_vehicles(depths, kinds, label):
    assert vtab.kitti_distance(objects(*depths, kinds=kinds)) == label


def test_labels_of_dsprites_and_smallnorb():
    for position, label in ((0, 0), (1, 0), (2, 1), (31, 15)):
        assert vtab.dsprites_location({"label_x_position": position}) == label
    # 40 orientations in 16 bins of two or three.
    bins = [vtab.dsprites_orientation({"label_orientation": i}) for i in range(40)]
    assert bins[:8] == [0, 0, 0, 1, 1, 2, 2, 2] and bins[39] == 15
    assert sorted(set(bins)) == list(range(16))
    features = {"label_azimuth": 17, "label_elevation": 8, "label_category": 3}
    assert (vtab.azimuth(features), vtab.elevation(features)) == (17, 8)


def builders():
    named = {f"vtab {name}": row.builder for name, row in vtab.TASKS.items()}
    named |= {f"fgvc {name}": row.builder for name, row in fgvc.TASKS.items()}
    return {name: builder for name, builder in named.items() if builder is not None}


class Even:
    """Noise has sequences of different lengths for one example's objects: cut them."""

    def __init__(self, features):
        self.features = features

    def __getitem__(self, index):
        features = self.features[index]
        if "objects" in features:
            shortest = min(len(values) for values in features["objects"].values())
            cut = {k: values[:shortest] for k, values in features["objects"].items()}
            features = features | {"objects": cut}
        return features


@pytest.mark.filterwarnings("default")  # TFDS's own
@pytest.mark.parametrize("name", builders())
def test_rules_read_the_real_schema(name):
    """TFDS's builder as it is, filled with noise."""
    builder = builders()[name]
    policy = tfds.testing.MockPolicy.USE_CODE
    with tfds.testing.mock_data(num_examples=4, policy=policy):
        made = tfds.builder(builder.name)
        assert str(made.version) in builder.versions
        split = TfdsSplit(Even(made.as_data_source(split="train")), builder)
    kind, name = name.split()
    classes = {"vtab": vtab, "fgvc": fgvc}[kind].TASKS[name].classes
    if "label" in made.info.features:
        assert made.info.features["label"].num_classes == classes
    for index in range(4):
        example = split[index]
        assert example["image"].dtype == np.uint8
        assert example["image"].shape[2] in (1, 3)
        assert isinstance(example["label"], int)


def write_tfds(root, builder, splits, file_format="array_record"):
    """A prepared set with `image` and `label`, written without TensorFlow."""
    name, version = builder.name, builder.versions[-1]
    folder = root / name / version
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": tfds.features.Scalar(np.int64)}
    )
    features.save_config(str(folder))
    written = []
    for split, examples in splits.items():
        file = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for image, number in examples:
            record = tf_example_pb2.Example()
            record.features.feature["image"].bytes_list.value.append(image)
            record.features.feature["label"].int64_list.value.append(number)
            writer.write(record.SerializeToString())
        writer.close()
        shards = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        sizes = {"shardLengths": [str(len(examples))], "numBytes": "1"}
        written.append({"name": split, "filepathTemplate": shards, **sizes})
    info = {"name": name, "version": version, "splits": written}
    info |= {"fileFormat": file_format}
    (folder / "dataset_info.json").write_text(json.dumps(info), "utf-8")


def encoded(mode, kind="PNG", side=4):
    file, rng = io.BytesIO(), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


DOGS = fgvc.TASKS["dogs"].builder


@pytest.mark.filterwarnings("default")  # TFDS's own
def test_files_of_tfds_are_read_whatever_their_mode(tmp_path):
    """A PNG with transparency or a palette, a CMYK photograph: the set has some."""
    modes = [("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG")]
    examples = [(encoded(*mode), 7) for mode in [*modes, ("L", "JPEG")] * 4]
    write_tfds(tmp_path, DOGS, {"train": examples, "test": examples})
    task = catalogue.load("dogs", tmp_path)
    assert (len(task.train), len(task.validation), len(task.test)) == (18, 2, 20)
    shapes = [task.test[i]["image"].shape for i in range(5)]
    assert shapes == [(4, 4, 3)] * 4 + [(4, 4, 1)]
    plain = task.test[0]["image"]
    np.testing.assert_array_equal(task.test[1]["image"], plain)
    assert np.abs(np.int32(task.test[2]["image"]) - plain).mean() < 40  # 256 colours
    assert task.test[0]["label"] == 7
    checked = check.checked(task, Console(file=io.StringIO()))
    assert len(checked.test) == 20


@pytest.mark.filterwarnings("default")
def test_a_corrupt_image_of_tfds_is_named(tmp_path):
    good, bad = encoded("RGB"), encoded("RGB")[:60]
    train = [(good, i) for i in range(20)]
    write_tfds(tmp_path, DOGS, {"train": train, "test": [(good, 0), (bad, 0)]})
    task = catalogue.load("dogs", tmp_path)
    with pytest.raises(
        ValueError, match=r"image 1 \(stanford_dogs\) cannot be decoded"
    ):
        check.checked(task, Console(file=io.StringIO()))
    kept = check.checked(task, Console(file=io.StringIO()), skip_corrupt=True)
    assert len(kept.test) == 1


@pytest.mark.filterwarnings("default")
def test_binary_images_of_tfds_become_0_and_255(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.eye(64, dtype=np.uint8)).save(file, "PNG")
    builder = dataclasses.replace(
        vtab.TASKS["dsprites_loc"].builder, label=lambda f: int(f["label"])
    )
    write_tfds(tmp_path, builder, {"train": [(file.getvalue(), 3)]})
    (source,) = builder.open(tmp_path, ["train"], "dsprites_loc").values()
    image = source[0]["image"]
    np.testing.assert_array_equal(image[..., 0], 255 * np.eye(64))


@pytest.mark.filterwarnings("default")
def test_a_set_in_a_format_that_has_no_index(tmp_path):
    write_tfds(tmp_path, DOGS, {"train": [(b"", 0)]}, file_format="tfrecord")
    with pytest.raises(FileNotFoundError, match=r"is in tfrecord.*: delete it"):
        catalogue.load("dogs", tmp_path)


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "here")):
        catalogue.load("dogs", pathlib.Path("~/here"))


def test_fgvc_holds_a_tenth_out_or_takes_the_official_split():
    sources = {"train": Counted("train", 5994), "test": Counted("test", 5794)}
    task = fgvc.from_sources("cub", sources)
    assert (len(task.train), len(task.validation), len(task.test)) == (5395, 599, 5794)
    seen = {s[i]["label"] for s in (task.train, task.validation) for i in range(len(s))}
    assert len(seen) == 5994
    again = fgvc.from_sources("cub", sources)
    assert [again.validation[i] for i in range(5)] == [
        task.validation[i] for i in range(5)
    ]
    sources = {name: Counted(name, 1020) for name in ("train", "validation", "test")}
    flowers = fgvc.from_sources("flowers", sources)
    assert flowers.validation[0]["label"] == ("validation", 0)
    assert len(flowers.train) == 1020
