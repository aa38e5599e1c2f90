"""Few images, corrupted ones, and changes over pairs of tasks, by hand."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from experiments import files
from experiments.config.images import ImageConfig
from experiments.data.source import Arrays, few, labels_of
from experiments.data.transforms import Transform
from experiments.studies import (
    cells,
    comparison,
    corruptions,
    keeping,
    sparsity,
    sparsity_report,
    tuned,
)
from experiments.studies.cells import Cell
from experiments.studies.corruptions import KINDS, SEVERITIES, Corrupted
from experiments.studies.recorded import packed
from experiments.studies.tuned import Tuned


def test_few_images_are_among_more():
    source = Arrays(np.zeros((40, 1, 1, 1), np.uint8), np.arange(40) % 4)
    five, two = (few(source, count) for count in (5, 2))
    assert np.bincount(labels_of(five)).tolist() == [5] * 4
    numbered = Arrays(np.arange(40, dtype=np.uint8).reshape(-1, 1, 1, 1), source.labels)
    more, fewer = (few(numbered, n).images.ravel().tolist() for n in (5, 2))
    assert set(fewer) < set(more) and fewer == sorted(fewer)
    assert len(few(source, 99)) == 40 and len(two) == 8


def test_corruptions_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    grey = np.full((224, 224, 3), 128, np.uint8)
    noisy = corruptions.noise(grey, 1, rng).astype(float)
    assert noisy.std() == pytest.approx(0.08 * 255, rel=0.01)
    edge = np.zeros((56, 56, 1), np.uint8)
    edge[:, 28:] = 200
    flat = corruptions.contrast(edge, 3, rng)
    assert np.unique(flat).tolist() == [80, 120]  # 100 -+ 0.2 * 100
    soft = corruptions.blur(edge, 5, rng)[28, :, 0].astype(float)
    slope = np.diff(soft).max()  # of a Gaussian of 10 / 4 pixels
    assert slope == pytest.approx(200 / (2.5 * (2 * np.pi) ** 0.5), rel=0.1)
    pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=15)
    np.testing.assert_array_equal(
        corruptions.jpeg(pixels, 3, rng), np.asarray(Image.open(file))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_corrupted_alike_each_time_at_the_models_size(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8)
    source, transform = Arrays(pixels, np.arange(2)), Transform((14, 14))
    corrupted = Corrupted(source, transform, kind, 3)
    one, again = corrupted[1]["image"], corrupted[1]["image"]
    np.testing.assert_array_equal(one, again)
    assert one.shape == (14, 14, 3) and corrupted[1]["label"] == 1
    assert len(corrupted) == 2


def test_changes_are_means_over_pairs_of_tasks():
    """Of two pairs: 50 points lost in one, none in the other."""
    before = {
        ("a", "b"): {0: np.array([1, 1, 1, 1])},
        ("b", "a"): {0: np.array([1, 0])},
    }
    after = {("a", "b"): {0: np.array([1, 0, 1, 0])}, ("b", "a"): {0: np.array([1, 0])}}
    found = sparsity_report._changes(before, after, "before", "after")
    assert (found["before"], found["after"]) == (75, 50)
    assert found["change"]["value"] == pytest.approx(-25)
    assert found["pairs"] == 2
    half = 12.7062 * 25  # Student's t of one degree, and the deviation by sqrt(2)
    assert found["change"]["high"] == pytest.approx(-25 + half, rel=1e-4)


def test_before_and_change_are_after_whatever_the_seeds():
    """Seeds of one task are more than the other's; one without its pair is left out."""
    rng = np.random.default_rng(0)
    before, after = (
        {
            ("a", "b"): {s: rng.integers(0, 2, 6) for s in seeds},
            ("b", "a"): {0: rng.integers(0, 2, 9)},
        }
        for seeds in ((0, 1, 2), (0, 1))
    )
    found = sparsity_report._changes(before, after, "before", "after")
    gap = found["after"] - found["before"]
    assert found["change"]["value"] == pytest.approx(gap)


def test_tasks_are_the_sample_of_changes():
    """Partners of a task share its model: they are averaged, and LoRA's taken off."""
    lora = {"a": {"b": -1.0, "c": -3.0}, "b": {"a": -4.0}}
    ours = {"a": {"b": 0.0, "c": -2.0, "d": 9.0}, "b": {"a": -1.0}, "d": {"a": 5.0}}
    rows = {
        "LoRA-8": {"change": sparsity_report._over(lora)},
        "SNELLA-8": {"change": sparsity_report._over(ours)},
    }
    assert rows["LoRA-8"]["change"]["value"] == pytest.approx(-3)
    sparsity_report._against(rows)
    found = rows["SNELLA-8"]["less LoRA's"]  # 1 on a, 3 on b
    assert found["value"] == pytest.approx(2)
    assert found["high"] == pytest.approx(2 + 12.7062, rel=1e-4)
    assert "less LoRA's" not in rows["LoRA-8"]
    assert sparsity_report._over({"a": {"b": 1.0}})["low"] is None


def test_what_corruptions_cost_is_held_against_lora():
    """LoRA loses two of four images; SNELLA one, in half of the tests, by hand."""
    lora, ours = (
        model("a", right=(1, 1, 1, 1)),
        model("a", "SNELLA-8", right=(1, 1, 1, 0)),
    )
    tests = [f"{kind} {s}" for kind in KINDS for s in SEVERITIES]

    def results(*kinds):
        """Of all tests; `kinds` in turn."""
        turns = [{"right": packed(right), "tested": 4} for right in kinds]
        return {name: turns[i % len(turns)] for i, name in enumerate(tests)}

    values = {
        "robustness": {
            lora.key: results([1, 1, 0, 0]),
            ours.key: results([1, 1, 1, 0], [0, 1, 1, 0]),
        }
    }
    report = sparsity_report.made([lora, ours], values, [])["corrupted"]
    assert report["LoRA-8"]["change"]["value"] == pytest.approx(-50)
    assert report["SNELLA-8"]["change"]["value"] == pytest.approx(-12.5)
    found = report["SNELLA-8"]["less LoRA's"]  # by image: -0.5, 0, 1, 1
    assert found["value"] == pytest.approx(37.5)
    error = 100 * np.std([-0.5, 0, 1, 1], ddof=1) / 2
    assert found["high"] == pytest.approx(37.5 + 3.18245 * error, rel=1e-4)
    assert "less LoRA's" not in report["LoRA-8"]


def folder(path, per_class, right):
    """A comparison of one cell, on so many images a class."""
    run = dataclasses.replace(comparison.REAL_TASKS.run, per_class=per_class)
    store = comparison.Table(comparison.Comparison(out=path, run=run)).store
    result = {"right": packed(right), "tested": 4, "trainable": 5}
    store.keep("birds", "lora", {"chosen": {"lr": 1e-3}, "seeds": {"0": result}})
    return path


def test_accuracy_by_images_is_of_several_folders(tmp_path):
    folders = [
        folder(tmp_path / "a", None, [1, 1, 1, 0]),
        folder(tmp_path / "b", 10, [1, 1, 0, 0]),
        folder(tmp_path / "c", 5, [1, 0, 0, 0]),
    ]
    found = sparsity_report.made([], {}, cells.read(folders))["images a class"]
    values = {name: own["value"] for name, own in found["LoRA-8"].items()}
    assert list(values.items()) == [("5", 25), ("10", 50), ("all", 75)]
    with pytest.raises(ValueError, match="both have LoRA-8 on birds, seed 0"):
        cells.read([folders[1], folder(tmp_path / "d", 10, [0, 0, 0, 0])])
    with pytest.raises(ValueError, match="training images a class: expected the same"):
        tuned.kept(cells.read(folders))


def model(task, label="LoRA-8", seed=0, right=(1, 1, 1, 1)):
    """A model of which only the results are there."""
    result = {"right": packed(right), "tested": len(right)}
    row = comparison.Row("lora")
    cell = Cell(Path("runs"), task, row, label, label, seed, {}, result, {})
    return Tuned(cell, Path("delta"), ImageConfig())


def test_seeds_without_a_model_are_named():
    a, b = (model(task) for task in "ab")
    assert tuned.not_kept([a.cell, b.cell], [a, b]) == ""
    assert "kept: LoRA-8 on b, seed 0." in tuned.not_kept([a.cell, b.cell], [a])


def test_a_task_that_joins_is_measured_for_all_models(tmp_path, monkeypatch):
    """Pair by pair, beside another process that writes into the same file."""
    taken, path = [], tmp_path / "measured.json"

    def forgetting(one, other):
        taken.append((one.cell.task, other.cell.task))
        values = files.read(path) or {}
        files.write(path, values | {"sizes": {"of another process": 1}})
        return {"right": packed([1, 0]), "before": packed([1, 1]), "tested": 2}

    monkeypatch.setattr(keeping, "forgetting", forgetting)
    how = ["forgetting"], tmp_path, Console(quiet=True)
    a, b, c = (model(task) for task in "abc")
    sparsity.measured([a, b], *how)
    assert taken == [("a", "b"), ("b", "a")]
    values = sparsity.measured([a, b, c], *how)
    assert sorted(taken[2:]) == [("a", "c"), ("b", "c"), ("c", "a"), ("c", "b")]
    assert values["sizes"] == {"of another process": 1}
    found = sparsity_report.made([a, b, c], values, [])["forgetting"]["LoRA-8"]
    assert (found["before"], found["after"], found["pairs"]) == (100, 50, 6)
