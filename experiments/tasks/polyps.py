"""Polyps in colonoscopy: Kvasir-SEG, CVC-ClinicDB, and PraNet's split of both.

All are for research and education only, and their authors want to be cited: Jha et al.,
Kvasir-SEG, MMM 2020; Bernal et al., CMIG 2015 (CVC-ClinicDB); Fan et al., PraNet,
MICCAI 2020.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from experiments.data import fingerprint, pairs, segmentation_task
from experiments.data.segmentation_task import SegmentationTask

TERMS = "research and education only"
KVASIR, CVC, PRANET, SESSILE = (
    ("kvasir_seg", "Kvasir-SEG"),
    ("cvc_clinicdb", "CVC-ClinicDB"),
    ("pranet",),
    ("sessile-main-Kvasir-SEG",),
)
KVASIR_SITE = "https://datasets.simula.no/kvasir-seg/"
CVC_SITE = "https://polyp.grand-challenge.org/CVCClinicDB/"
PRANET_SITE = "https://github.com/DengPingFan/PraNet"
LISTS_SITE = "Data-split/ of https://github.com/DebeshJha/Kvasir-SEG"
LISTS = {
    "train.txt": "49992c7c6c80abf02032050d4ae754236da3ba1041f609659ad0043ff6d1795c",
    "val.txt": "d9b48bd3d980324edb39df97764fdbb5489b2583f088fb49c659b76f6d20876b",
}


def kvasir(data_dir: Path, validation: float) -> SegmentationTask:
    """Loads Kvasir-SEG: the official 880 images to train on, and 120 for tests.

    Args:
      data_dir: has the folder `kvasir_seg` with `images/`, `masks/` and the lists
        `train.txt` and `val.txt`, the second of which is the test.
      validation: share of the training images that is held out.

    Raises:
      FileNotFoundError: images or lists are missing; says where they are.
      ValueError: as `segmentation_task.load`.
    """
    lists = f"train.txt and val.txt (in {LISTS_SITE})"
    folder = _folder(
        data_dir, KVASIR, f"unpack {KVASIR_SITE} there, and put {lists} beside images/"
    )
    for name in LISTS:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: put {lists} there.")
    task = segmentation_task.load(folder, validation, "Kvasir-SEG")
    found = fingerprint.of_files([folder / name for name in LISTS])
    other = [name for name in LISTS if found[name] != LISTS[name]]
    if not other:
        return task
    note = f"{folder}: {' and '.join(other)} are not the official lists"
    return dataclasses.replace(task, notes=(note, *task.notes))


def cvc_clinicdb(data_dir: Path) -> SegmentationTask:
    """Loads CVC-ClinicDB, all 612 images as a test.

    Its 29 sequences are frames of a video each, which look alike: drawn at random,
    those of one would be in two splits.

    Args:
      data_dir: has the folder `cvc_clinicdb`, with `images/` and `masks/` or with
        `Original/` and `Ground Truth/`.

    Raises:
      FileNotFoundError: the images are missing; says where they are.
      ValueError: an image has no mask, or a mask no image.
    """
    folder = _folder(data_dir, CVC, f"unpack {CVC_SITE} there")
    return segmentation_task.test_only(folder, "CVC-ClinicDB")


def kvasir_released(data_dir: Path, validation: float) -> SegmentationTask:
    """Loads what GPS's released code trains and tests on: its tests are trained on.

    It trains on all 1000 images of Kvasir-SEG, and tests on the 196 of its images that
    its authors release once more as those with small, flat polyps.

    Args:
      data_dir: has the folders `kvasir_seg` and `sessile-main-Kvasir-SEG`, both with
        `images/` and `masks/`.
      validation: share of the training images that is held out.

    Raises:
      FileNotFoundError: images are missing; says where they are.
      ValueError: an image has no mask, or a mask no image.
    """
    what = f"unpack {KVASIR_SITE} there"
    folder = _folder(data_dir, KVASIR, what)
    tests = pairs.read(_folder(data_dir, SESSILE, what))
    whole = pairs.read(folder).whole()
    held_out, train = segmentation_task.hold_out(folder, whole, validation)
    name = "Kvasir-SEG, tests trained on"
    return SegmentationTask(name, train, held_out, tests.whole())


def pranet(data_dir: Path, validation: float) -> SegmentationTask:
    """Loads PraNet's split: 900 + 550 images to train on, 100 + 62 for tests.

    Args:
      data_dir: has the folder `pranet` with `TrainDataset/` and `TestDataset/`. Each
        folder of the second is an extra test.
      validation: share of the training images that is held out.

    Raises:
      FileNotFoundError: images are missing; says where they are.
      ValueError: as `segmentation_task.load`.
    """
    what = f"unpack TrainDataset.zip and TestDataset.zip of {PRANET_SITE} there"
    folder = _folder(data_dir, PRANET, what)
    return segmentation_task.load(folder, validation, "Kvasir-SEG and CVC-ClinicDB")


def _folder(data_dir: Path, names: Sequence[str], what: str) -> Path:
    """Returns the folder of a set; if there is none, says what to do."""
    for name in names:
        if segmentation_task.is_folder(data_dir / name):
            return data_dir / name
    raise FileNotFoundError(
        f"There are no images with masks in {data_dir / names[0]}: {what}. The set is "
        f"for {TERMS}; cite its authors."
    )
