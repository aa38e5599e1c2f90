"""A task of tiny pictures on disk, and a run on it that was killed at its end."""

import pathlib
import shutil

import numpy as np
from PIL import Image
from places import ROOT

from experiments import vtab

CLASSIFIER = ROOT / "tests/assets/vit/classifier"
# One matrix of each of its three blocks: a step compiles in a third of the time.
TARGETS = "--targets=blocks/mlp/fc1"
WEIGHTS = 3 * 12 * 24  # of these matrices


def draw(root, each=4, **others):
    """Two classes, `dark` and `light`, of 28 x 28 pixels; `each` of every split."""
    rng = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for label, kind in enumerate(("dark", "light")):
            (root / part / kind).mkdir(parents=True)
            for index in range(others.get(part, each)):
                noise = rng.integers(0, 90, (28, 28), dtype=np.uint8)
                picture = Image.fromarray(noise + np.uint8(150 * label))
                picture.save(root / part / kind / f"{index}.png")


def short(root, *more, **each):
    """Words of a short run on pictures in `root`, by a tiny ViT on one device.

    Later words win; `each` is `draw`'s.
    """
    if not (root / "pets").exists():
        draw(root / "pets", **each)
    return [
        "--config=quickstart", f"--task={root / 'pets'}", f"--model={CLASSIFIER}",
        "--image_size=24", "--mesh=data=1", "--batch=4", "--warmup_epochs=0", TARGETS,
        *more,
    ]  # fmt: skip


def words(name, *more):
    """A short run on `name`, with weights of the same name in `weights`."""
    return [
        "--config=quickstart", f"--task={name}", f"--model=weights/{name}",
        "--image_size=24", "--mesh=data=1", "--batch=4", "--warmup_epochs=0", TARGETS,
        *more,
    ]  # fmt: skip


def killed(name, *more):
    """Runs in the current folder, into `run`, and removes what a run writes last."""
    draw(pathlib.Path(name))
    shutil.copytree(CLASSIFIER, pathlib.Path("weights", name))
    summary = vtab.main(words(name, "--out=run", *more))
    for file in ("results.json", "summary.json"):
        pathlib.Path("run", file).unlink()
    return summary
