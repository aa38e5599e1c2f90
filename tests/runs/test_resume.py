"""A run that is killed and gone on with ends as one that was not; what stops a run."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pictures
import pytest
import slowed
from compiled import called
from flax import nnx
from places import ROOT

from experiments import vtab
from experiments.data.source import Arrays
from experiments.data.task import Task
from experiments.data.transforms import Transform
from experiments.pretrained import small_vit
from experiments.training import evaluation, metric_log, sharding
from experiments.training.checkpoints import Checkpoints
from experiments.training.classification import Classification
from experiments.training.recipe import Recipe
from experiments.training.trainer import Data, Trainer
from snella_jax.models.vit import ViT, ViTConfig

CLASSES = Classification()
(ACCURACY,) = CLASSES.metrics


def started(*options):
    return subprocess.Popen(
        [sys.executable, "-c", slowed.program("vtab"), *map(str, options)],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def kill_after(process, out, rows, delay):
    """SIGKILL some time after so many epochs were logged."""
    path, deadline = out / metric_log.NAME, time.monotonic() + 600
    while not path.exists() or path.read_text("utf-8").count("\n") < rows:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


def weights(out):
    """Everything that the last checkpoint holds."""
    manager = Checkpoints(out / "checkpoints" / "snella", ACCURACY).manager
    found = manager.restore(manager.latest_step())
    manager.close()
    return found["state"], found["position"]


def interrupt(monkeypatch, words, rows, where):
    """Ctrl-C as soon as `where` is done for the last of so many epochs."""
    owner, name = where
    inner, count = getattr(owner, name), [0]

    def last(*given, **named):
        inner(*given, **named)
        count[0] += 1
        if count[0] == rows:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, last)
        with pytest.raises(SystemExit, match="Go on with it by --resume"):
            vtab.main(words)


LOGGED, SAVED = (metric_log, "log"), (Checkpoints, "save")


@pytest.mark.parametrize("devices", ["data=1", "data=4"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(devices, tmp_path, monkeypatch):
    """Interrupted before and after a checkpoint; on one device killed between them."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    own = ["--epochs=4", "--methods", "snella", f"--mesh={devices}"]
    words = pictures.short(tmp_path, *own, each=8)
    vtab.main([*words, f"--out={whole}"])
    resume = ["--resume", str(broken)]
    if devices == "data=1":
        interrupt(monkeypatch, [*words, f"--out={broken}"], 1, LOGGED)
        # Other moments each time.
        delay = np.random.default_rng().uniform(0, 0.6)
        kill_after(started(*resume), broken, 2, delay)
        interrupt(monkeypatch, resume, 1, SAVED)
    else:
        interrupt(monkeypatch, [*words, f"--out={broken}"], 2, LOGGED)
    assert not (broken / "summary.json").exists()
    summary = vtab.main(resume)
    rows = [metric_log.of(out, "snella") for out in (whole, broken)]
    for row in (*rows[0], *rows[1]):
        row.pop("seconds_per_step")
    assert rows[0] == rows[1] and len(rows[0]) == 4
    for one, other in zip(
        *(jax.tree.leaves(weights(o)) for o in (whole, broken)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    result = summary["methods"]["snella"]
    expected = json.loads((whole / "summary.json").read_text("utf-8"))["methods"][
        "snella"
    ]
    for name in ("test_accuracy", "weights_moved", "density", "val_accuracy"):
        assert result[name] == expected[name]
    assert (broken / "figures/allocation.png").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--resume", "nowhere"],
        ["--resume", ".", "--seed", "3"],
        ["--resume=.", "--help"],
    ],
)
def test_resume_stands_alone_and_needs_a_run(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "nowhere" not in options:
        pathlib.Path("config.json").write_text("{}", "utf-8")
    with pytest.raises(SystemExit, match="--resume FOLDER stands alone"):
        vtab.main(options)


def test_rows_after_the_checkpoint_and_half_written_ones_are_dropped(tmp_path):
    for epoch in (1, 2, 3):
        metric_log.log(tmp_path, {"method": "lora", "epoch": epoch})
        metric_log.log(tmp_path, {"method": "snella", "epoch": epoch})
    with (tmp_path / metric_log.NAME).open("a", encoding="utf-8") as file:
        file.write('{"method": "snella", "ep')
    metric_log.keep(tmp_path, "snella", 2)
    assert [row["epoch"] for row in metric_log.of(tmp_path, "snella")] == [1, 2]
    assert [row["epoch"] for row in metric_log.of(tmp_path, "lora")] == [1, 2, 3]


# The trainer by itself


TINY = ViTConfig(
    width=8, depth=1, heads=2, patch_size=4, image_size=8, channels=1, num_classes=2
)
TRANSFORM = Transform((8, 8), mean=(0.5,), std=(0.5,))


def task(size=20):
    images = np.random.default_rng(0).integers(0, 256, (size, 8, 8, 1), np.uint8)
    part = Arrays(images, np.arange(size) % 2)
    return Task("noise", 2, part, part, part)


@contextlib.contextmanager
def training(folder, epochs=3, **options):
    how = CLASSES, Recipe(epochs=epochs, batch=4, lr=1e-2), sharding.make("data=1")
    data = Data(task().train, task().validation, TRANSFORM, TRANSFORM)
    model = ViT(TINY, rngs=nnx.Rngs(0))
    with contextlib.closing(Checkpoints(folder, ACCURACY)) as saved:
        trainer = Trainer(model, data, *how, checkpoints=saved, **options)
        with contextlib.closing(trainer):
            yield trainer


def run(trainer):
    return list(trainer.train(lambda _: None))


def test_a_finished_run_has_nothing_left_and_the_model_as_it_ended(tmp_path):
    with training(tmp_path) as first:
        assert [done.number for done in run(first)] == [1, 2, 3]
    with training(tmp_path) as again:
        assert again.passed == 3 and run(again) == []
    for one, other in zip(
        jax.tree.leaves(nnx.state(first.model)),
        jax.tree.leaves(nnx.state(again.model)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_the_newest_and_the_best_checkpoint_stay_also_after_a_restart(tmp_path):
    kept = []
    for epoch, accuracy in enumerate((0.2, 0.9, 0.4, 0.5, 0.95, 0.1), start=1):
        with contextlib.closing(Checkpoints(tmp_path, ACCURACY)) as checkpoints:
            state, position = {"x": np.ones(2)}, {"next_index": epoch}
            checkpoints.save(epoch, state, position, accuracy)
        kept.append("".join(sorted(p.name for p in tmp_path.iterdir() if p.is_dir())))
    assert kept == ["1", "2", "23", "24", "5", "56"]


def test_a_half_written_checkpoint_is_never_taken(tmp_path):
    with training(tmp_path, epochs=2) as first:
        run(first)
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    with training(tmp_path) as again:
        assert again.passed == 2
        assert [done.number for done in run(again)] == [3]
    with training(tmp_path) as whole:
        assert whole.passed == 3
    assert list(tmp_path.glob("*tmp")) == []


@pytest.mark.parametrize(
    ("at", "step", "epoch"), [(7, 3, 2), (9, 5, 2), (14, 5, 3), (0, 1, 1)]
)
def test_an_update_that_is_not_finite_is_named_and_never_saved(
    at, step, epoch, tmp_path
):
    """Also that of an epoch's last step, whose loss was finite still."""

    def bomb(at):
        def explode(updates, state, params=None):
            return jax.tree.map(lambda u: u / (state != at), updates), state + 1

        return optax.GradientTransformation(lambda _: jax.numpy.zeros((), int), explode)

    with (
        training(tmp_path, watch=(bomb(at),)) as first,
        pytest.raises(FloatingPointError) as error,
    ):
        run(first)
    said = str(error.value)
    assert (
        f"not finite at step {step} of epoch {epoch}, on the training examples ["
        in said
    )
    good = epoch - 1
    if good:
        assert f"the checkpoint of epoch {good} is in {tmp_path}" in said
    else:
        assert "there is no checkpoint before it" in said
    with training(tmp_path, watch=(bomb(at=-1),)) as again:
        assert again.passed == good
        run(again)
    for leaf in jax.tree.leaves(nnx.state(again.model)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("devices", ["data=1", "data=3"])
def test_evaluation_counts_every_image_once(devices):
    model = small_vit.load(0)
    images = np.zeros((300, 28, 28, 1), np.uint8)
    image = small_vit.TRANSFORM(images[0], np.random.default_rng(0))
    prediction = int(called(model, image[None])[0].argmax())
    labels = np.where(np.arange(300) < 299, prediction, prediction - 1)
    where = small_vit.TRANSFORM, sharding.make(devices)
    got = evaluation.evaluate(model, Arrays(images, labels), *where, CLASSES)
    assert got.metrics["accuracy"] == pytest.approx(299 / 300)
