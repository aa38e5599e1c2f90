"""Runs whose length is given in updates, and whose rounds are no epochs."""

import dataclasses
import json
import pathlib
import shutil

import pictures
import pytest
from rich.console import Console

from experiments import vtab
from experiments.config.images import ImageConfig
from experiments.methods.snella import Snella
from experiments.runs import images, run
from experiments.training.metric_log import Tracker

# Two updates an epoch, of eight images; rounds of three, three and one.
CONFIG = ImageConfig(
    task="pets",
    model="weights/pets",
    image_size=24,
    targets="blocks/mlp/fc1",
    mesh="data=1",
    methods=("snella",),
    batch=4,
    steps=7,
    round_steps=3,
    schedule="linear",
    warmup_epochs=1,
    settings={"snella": Snella(lr=1e-2, rank=2)},
)
QUIET = Console(quiet=True)


def started(out, resume=False, **changes):
    config = dataclasses.replace(CONFIG, out=pathlib.Path(out), **changes)
    return run.run(images.prepared("pets", config, QUIET), resume)


def rows(out):
    lines = pathlib.Path(out, "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) | {"seconds_per_step": None} for line in lines]


def test_a_run_in_updates_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Killed in its second round, after the first, which ends within an epoch."""
    monkeypatch.chdir(tmp_path)
    pictures.draw(pathlib.Path("pets"))
    shutil.copytree(pictures.CLASSIFIER, "weights/pets")
    summary = started("whole")
    whole = rows("whole")
    assert [row["updates"] for row in whole] == [3, 6, 7]
    assert [row["epoch"] for row in whole] == [1, 2, 3]
    expected = [0.3 + 0.7 * (1 - t / 2) ** 3 for t in range(3)]  # Eq. 12
    assert [row["density"] for row in whole] == pytest.approx(expected, abs=1e-3)
    # Up to the third update, from the rate of the fourth down to 0 after the seventh.
    rates = [1e-2 * 2 / 3, 1e-2 * 2 / 4, 1e-2 * 1 / 4]
    assert [row["lr"] for row in whole] == pytest.approx(rates)
    assert summary["metrics"][0]["name"] == "accuracy"
    assert pathlib.Path("whole/figures/predictions_snella.png").exists()

    def log_and_stop(tracker, row, log=Tracker.log):
        log(tracker, row)
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log_and_stop)
        with pytest.raises(SystemExit, match="Go on with it by --resume"):
            started("broken")
    again = started("broken", resume=True)
    assert rows("broken") == whole
    timed = "seconds_per_step"
    for one, other in ((summary, again), (again, summary)):
        for name, value in one["methods"]["snella"].items():
            assert name == timed or other["methods"]["snella"][name] == value
    with pytest.raises(ValueError, match="moves between rounds, of which there are 1"):
        started("short", steps=3, warmup_epochs=0)


def test_a_run_has_one_length():
    with pytest.raises(SystemExit, match="--epochs and --steps both give"):
        vtab.main(["--config", "quickstart", "--epochs", "3", "--steps=100"])
