"""A comparison chooses for every method alike, and does nothing twice."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from experiments import compare, plotting
from experiments.config.images import ImageConfig
from experiments.data import check
from experiments.data.source import Arrays
from experiments.methods.dora import Dora
from experiments.methods.lora import Lora
from experiments.reports import text as report_text
from experiments.runs import images, run, search
from experiments.studies import comparison, comparison_figure, table_store
from experiments.tasks import catalogue, digits
from experiments.training import grid, sharding
from experiments.training.classification import Classification
from snella_jax.models import vit

SMALL = ["--run.model", "vit_fashion_mnist", "--run.image_size", "None"]
SHORT = ["--run.epochs", "1", "--run.warmup_epochs", "0", "--search_epochs", "1"]
GRID = ["--run.grid.lr_factors", "0.1", "--run.grid.lr_extensions", "0"]
TABLE = ["--methods", "linear", "lora", "--controls", "linear", "--seeds", "0", "1"]
TABLE += ["--run.linear.strengths", "1"]
# One matrix of a block: a step compiles in a third of the time.
TARGETS = ["--run.targets", "blocks/mlp/fc1"]
OPTIONS = [*SMALL, *TARGETS, *SHORT, *GRID, *TABLE, "--tasks", "digits"]


@pytest.fixture
def few_digits(monkeypatch):
    """A tenth of the digits, in the place of all."""
    task = digits.load()
    few = {
        part: Arrays(own.images[:80], own.labels[:80])
        for part in ("train", "validation", "test")
        for own in [getattr(task, part)]
    }
    task = dataclasses.replace(task, **few)
    monkeypatch.setattr(digits, "load", lambda: task)


def read(path):
    return json.loads(path.read_text("utf-8"))


def test_a_comparison_goes_on_with_its_results_alone(
    few_digits, tmp_path, monkeypatch, capsys
):
    inner, runs, out = run._run, [], tmp_path / "first"

    def interrupt(setting):
        runs.append((setting.config, setting.out.relative_to(out).parts[-2:]))
        if len(runs) == 3:  # LoRA's second seed
            raise KeyboardInterrupt
        return inner(setting)

    monkeypatch.setattr(run, "_run", interrupt)
    with pytest.raises(SystemExit, match="The same command goes on with it"):
        compare.main([*OPTIONS, "--out", str(out)])
    done = read(out / "results.json")["rows"]["digits"]
    assert [len(row["seeds"]) for row in done.values()] == [1, 1]
    trials, chosen = (done["lora"][name] for name in ("trials", "chosen"))
    assert [t["lr"] for t in trials] == [1e-3, pytest.approx(1e-4)]
    best = max(trials, key=lambda trial: trial["val_accuracy"])
    assert chosen == {name: best[name] for name in chosen}
    assert not list(out.glob("runs/*/*/seed0/checkpoints"))

    first, out = out, tmp_path / "elsewhere"
    out.mkdir()
    shutil.copy(first / "results.json", out)
    compare.main([*OPTIONS, "--out", str(out)])
    names = [name for _, name in runs]
    assert names == [
        ("linear", "seed0"), ("lora", "seed0"), ("lora", "seed1"),
        ("lora", "seed1"), ("linear_random", "seed0"), ("linear_random", "seed1"),
    ]  # fmt: skip
    assert {c.settings["lora"].lr for c, name in runs if "lora" in name} == {
        chosen["lr"]
    }
    assert {c.protocol for c, _ in runs} == {"final"}
    assert [c.random_weights for c, _ in runs] == [False] * 4 + [True] * 2
    rows = read(out / "results.json")["rows"]["digits"]
    assert rows["lora"]["trials"] == trials
    assert rows["lora"]["seeds"]["0"] == done["lora"]["seeds"]["0"]
    accuracies = [own["test_accuracy"] for own in rows["lora"]["seeds"].values()]
    columns = {c["method"]: c["tasks"].get("digits") for c in table(out)["columns"]}
    ours = {method for method, cell in columns.items() if cell}
    assert ours == {"linear probe", "linear probe, random weights", "LoRA-8"}
    lines = (out / "report.md").read_text("utf-8").splitlines()
    missing = {line.split(" |")[0]: line for line in lines}
    assert missing["| GPS"].count(" – ") == 1  # noqa: RUF001
    assert columns["LoRA-8"]["mean"] == pytest.approx(100 * np.mean(accuracies))
    random = rows["linear_random"]["seeds"]
    assert random["0"]["test_accuracy"] != random["1"]["test_accuracy"]
    assert random["0"]["test_accuracy"] < rows["linear"]["seeds"]["0"]["test_accuracy"]

    del runs[:]
    compare.main([*OPTIONS, "--out", str(out), "--table_only"])
    compare.main([*OPTIONS, "--out", str(out)])  # all is done
    assert not runs and table(out) and "LoRA-8" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was made with another epochs:"):
        compare.main([*OPTIONS, "--run.epochs", "2", "--out", str(out)])


def test_accuracy_is_drawn_against_memory(tmp_path):
    """A point needs both; random weights have none of their own."""
    table = comparison.Table(comparison.Comparison(out=tmp_path))
    seeds = {
        str(seed): {"test_accuracy": accuracy, "trainable": 5}
        for seed, accuracy in enumerate((0.5, 0.6, 0.7))
    }
    for row in (
        comparison.Row("lora"),
        comparison.Row("snella"),
        comparison.Row("lora", True),
    ):
        table.store.keep("digits", row.name, {"chosen": {"lr": 1e-3}, "seeds": seeds})
    table.store.keep("elpv", "dora", {"chosen": {}, "trials": []})
    memory = {name: {"total_bytes": 2**30} for name in ("lora", "dora", "full")}
    made = table.made()
    paper = {"method": "LoRA-8", "paper": True, "tasks": {"digits": {"mean": 1.0}}}
    made["columns"].append(paper)  # which has no deviations
    assert table.points(made, memory) == [
        {
            "task": "digits",
            "method": "LoRA-8",
            "accuracy": pytest.approx(60),
            "deviation": pytest.approx(10),
            "bytes": 2**30,
        }
    ]
    setting = {"model": "vit", "target": "h100", "batch": 64, "dtype": "bfloat16"}
    setting |= {"frozen_dtype": "bfloat16"}
    path = tmp_path / "accuracy.png"
    comparison_figure.accuracy_memory(path, table.points(made, memory), setting, "here")
    assert path.stat().st_size > 10_000
    two = [{"model": "a", "method": "lora"}, {"model": "b", "method": "lora"}]
    (tmp_path / "two.json").write_text(json.dumps(two), "utf-8")
    for name in ("two.json", "none.json"):
        with pytest.raises(SystemExit, match=rf"{name}: expected a memory.json of one"):
            compare.main(["--out", str(tmp_path), "--memory", str(tmp_path / name)])


def test_a_method_that_did_not_learn_does_not_squeeze_the_others(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plotting, "save", lambda figure, path: drawn.append(figure))
    accuracies = {  # SNELL-8 has learnt in some seeds only
        "linear probe": (50.0, None),
        "LoRA-8": (70.0, 1.0),
        "SNELL-8": (28.0, 38.0),
        "Mix-K-8": (6.0, None),
    }
    points = [
        {"task": "t", "method": name, "accuracy": y, "deviation": d, "bytes": 2**30}
        for name, (y, d) in accuracies.items()
    ]
    setting = dict.fromkeys(("model", "target", "batch", "dtype", "frozen_dtype"), "x")
    comparison_figure.accuracy_memory(tmp_path / "a.png", points, setting, "here")
    comparison_figure.accuracy_memory(tmp_path / "b.png", points[1:], setting, "here")
    (axes,), (unprobed,) = (figure.axes for figure in drawn)
    assert 40 < axes.get_ylim()[0] < 50
    texts = {text.get_text() for text in axes.texts}
    assert {"Mix-K-8: 6.0", "SNELL-8: 28.0 ± 38.0"} < texts
    assert unprobed.get_ylim()[0] < 6


def table(out):
    return read(out / "report.json")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--run.seed", "3"], "run.seed: the comparison sets it by itself"),
        (["--run.protocol", "choose"], "run.protocol: the comparison"),
        (["--run.random_weights"], "run.random_weights: the comparison"),
        (
            ["--tasks", "digits", *SMALL, "--run.noah.limit", "1"],
            r"noah\.limit=1",
        ),
        (["--seeds"], "at least one task, one seed and one method"),
        (["--search_epochs", "3"], "search_epochs=3: expected more than the 3"),
        (["--run.lora.rank", "0"], "lora.rank=0"),
        (["--run.grid.lr_extensions", "-1"], "lr_extensions >= 0"),
        (["--tasks", "digits", "digitz"], "digitz"),
        (["--run.mosa.parts", "1"], "mosa.parts=1"),
        (["--run.spt_lora.share", "0"], "spt_lora.share=0"),
        (
            [*SMALL, "--run.targets", "nothing", "--tasks", "digits"],
            "targets='nothing'",
        ),
    ],
)
def test_a_wrong_option_is_said_before_anything_runs(tmp_path, words, message):
    with pytest.raises(SystemExit, match=message):
        compare.main([*words, "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_a_new_method_joins_an_old_comparison(tmp_path):
    """Its settings are not among those that the folder was made with."""
    table = comparison.Table(comparison.Comparison(out=tmp_path))
    found = read(table.store.path)
    del found["shared"]["vqt"]
    del found["shared"]["clip"]  # a setting that there was not, as if it was 0
    table.store.path.write_text(json.dumps(found), "utf-8")
    for name in ("epochs", "clip"):
        wrong = dataclasses.replace(comparison.RUN, **{name: 99})
        with pytest.raises(ValueError, match=f"another {name}:"):
            comparison.Table(comparison.Comparison(run=wrong, out=tmp_path))
    assert "vqt" not in read(table.store.path)["shared"]  # a refusal leaves no trace
    comparison.Table(comparison.Comparison(out=tmp_path))
    assert read(table.store.path)["shared"]["vqt"]["count"] == 1
    (tmp_path / "runs").mkdir()
    table.store.path.unlink()
    with pytest.raises(ValueError, match="has runs and no"):
        comparison.Table(comparison.Comparison(out=tmp_path))


def test_a_cell_that_runs_out_of_memory_does_not_stop_the_others(tmp_path, monkeypatch):
    def tune(method, setting):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(search, "tune", tune)
    methods = ["--methods", "lora", "gps", "--controls", "--tasks", "digits"]
    with pytest.raises(SystemExit) as stopped:
        compare.main([*SMALL, *SHORT, *GRID, *methods, "--out", str(tmp_path)])
    text = "RESOURCE_EXHAUSTED: Out of memory"
    texts = [f"digits, {method}, search: {text}" for method in ("lora", "gps")]
    assert str(stopped.value) == "\n".join(texts)
    rows = read(tmp_path / "results.json")["rows"]["digits"]
    assert [row["failed"] for row in rows.values()] == [{"search": text}] * 2


def test_a_seed_that_fails_does_not_stop_the_others(tmp_path):
    """It is in no mean, and the table says so; it is tried again."""
    table = comparison.Table(comparison.Comparison(out=tmp_path))
    quiet, tried, diverges = Console(quiet=True), [], True

    def train(out, seed, chosen):
        tried.append(seed)
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        if seed == 1 and diverges:
            raise run.RunFailed("the loss is nan")
        return {"test_accuracy": 0.5 + seed / 10, "trainable": 5}

    def complete():
        cell, search = ("digits", "lora"), lambda place: {"chosen": {"lr": 1e-3}}
        return table_store.attempt(
            "here", table.store, cell, (0, 1, 2), search, train, quiet
        )

    text = "digits, lora, seed 1: the loss is nan"
    for _ in range(2):
        assert complete() == text
    assert tried == [0, 1, 2, 1]
    assert table.made()["failed"] == [text]
    assert f"Failed, and in no mean: {text}" in report_text.markdown(table.made())
    assert [p.parent.name for p in tmp_path.rglob("checkpoints")] == ["seed1"]
    diverges = False
    assert complete() is None and not table.made()["failed"]
    assert "Failed" not in report_text.markdown(table.made())
    lora = next(c for c in table.made()["columns"] if c["method"] == "LoRA-8")
    assert lora["tasks"]["digits"]["seeds"] == {"0": 0.5, "1": 0.6, "2": 0.7}


def test_a_task_of_ones_own_runs_in_the_comparisons_folder(tmp_path):
    """Not beside its images, whatever its path."""
    for task in ("/data/pets", "../pets.csv", "/elsewhere/pets"):
        where = table_store.place(tmp_path, task, "lora")
        assert where.parents[1] == tmp_path / "runs"
        assert where.parent.name.startswith("pets-")
    assert (
        len({table_store.place(tmp_path, t, "lora") for t in ("/a/pets", "/b/pets")})
        == 2
    )
    assert (
        table_store.place(tmp_path, "digits", "lora") == tmp_path / "runs/digits/lora"
    )


def test_a_run_goes_on_with_its_own_settings_alone(tmp_path):
    """On whatever devices, and whatever methods that do not run are set to."""
    quiet = Console(quiet=True)
    task = check.checked(catalogue.load("digits"), quiet)
    began = ImageConfig(methods=("lora",), settings={"lora": Lora(lr=1e-3)})

    model = vit.create("vit_ti16", depth=1, image_size=16, rngs=nnx.Rngs(0))

    def begin(config):
        one = sharding.make("data=1")
        return run.begin(images.ImageRun(config, task, model, one, quiet, tmp_path))

    begin(began)
    begin(dataclasses.replace(began, mesh="data=2", data_dir=Path("elsewhere")))
    begin(began.with_settings(dora=Dora(lr=1.0)))
    known = read(tmp_path / "config.json")
    del known["clip"], known["vqt"]  # of an earlier version
    (tmp_path / "config.json").write_text(json.dumps(known), "utf-8")
    begin(began)
    other = dataclasses.replace(began.with_settings(lora=Lora(lr=1e-4)), clip=2.0)
    with pytest.raises(
        ValueError, match=r"begun with another clip, lora\.lr: expected"
    ):
        begin(other)
    assert read(tmp_path / "config.json") == known


def test_a_search_goes_beyond_its_lowest_and_highest_rate():
    assert grid.beyond([0.02, 0.01, 0.04], 0.02) == []
    assert grid.beyond([0.02, 0.01, 0.04], 0.04) == [0.08]
    assert grid.beyond([0.02, 0.01, 0.04], 0.01) == [0.005]
    assert grid.beyond([0.02], 0.02) == []
    assert grid.beyond([0.02, 0.02, 0.04], 0.02) == [0.01]


@pytest.mark.parametrize("peak, lrs", [
    (1e-2, [1e-3, 3e-4, 3e-3, 9e-3, 2.7e-2]),
    (1.0, [1e-3, 3e-4, 3e-3, 9e-3, 2.7e-2]),
    (1e-3, [1e-3, 3e-4, 3e-3]),
    (1e-9, [1e-3, 3e-4, 3e-3, 9e-5, 2.7e-5]),
])  # fmt: skip
def test_the_search_follows_the_best_rate(tmp_path, monkeypatch, peak, lrs):
    """Accuracy falls with the distance from a peak, in decades."""

    def score(method, setting, settings, index):
        accuracy = 1 - abs(np.log10(settings.lr / peak)) / 10
        return settings.searched | {"val_accuracy": accuracy}

    monkeypatch.setattr(search, "_trial", score)
    chosen = search.chosen("lora", Setting(comparison.RUN, tmp_path))
    trials = read(tmp_path / search.FILE)["lora"]
    assert [t["lr"] for t in trials] == pytest.approx(lrs)
    best = min(lrs, key=lambda lr: abs(np.log10(lr / peak)))
    assert chosen.settings["lora"].lr == pytest.approx(best)


def test_of_rates_that_tie_the_lowest_goes_on(tmp_path, monkeypatch):
    """Where all are too high, the search goes on below."""

    def score(method, setting, settings, index):
        accuracy = 0.06 if settings.lr > 2e-4 else 0.5
        return settings.searched | {"val_accuracy": accuracy}

    monkeypatch.setattr(search, "_trial", score)
    run = dataclasses.replace(comparison.RUN, grid=grid.Grid((0.3, 3.0), 2, (0.05,)))
    chosen = search.chosen("lora", Setting(run, tmp_path)).settings["lora"]
    trials = read(tmp_path / search.FILE)["lora"]
    lrs = [1e-3, 3e-4, 3e-3, 9e-5, 2.7e-5, 2.7e-5]
    assert [t["lr"] for t in trials] == pytest.approx(lrs)
    assert (chosen.lr, chosen.weight_decay) == (pytest.approx(2.7e-5), 1e-4)


def test_the_density_of_a_mask_is_searched(tmp_path, monkeypatch):
    """With the best rate."""
    trials = []

    def tune(method, setting):
        own = setting.config.settings[method]
        density = getattr(own, "target_density", None)
        trials.append((own.lr, density))
        accuracy = own.lr * (1 + (density == 0.1))
        return SimpleNamespace(last_row={"val_accuracy": accuracy, "train_loss": 0})

    monkeypatch.setattr(search, "tune", tune)
    run = dataclasses.replace(comparison.RUN, grid=grid.Grid((2.0,), 0, (), (0.1, 0.6)))
    chosen = search.chosen("snella_masked", Setting(run, tmp_path)).settings[
        "snella_masked"
    ]
    assert trials == [(3e-3, 0.3), (6e-3, 0.3), (6e-3, 0.1), (6e-3, 0.6)]
    assert (chosen.lr, chosen.target_density) == (6e-3, 0.1)
    for method in ("klora", "spt_lora"):  # neither has a density to search
        del trials[:]
        search.chosen(method, Setting(run, tmp_path))
        assert len(trials) == 2
    run = dataclasses.replace(run, search=True, methods=("snella_masked",))
    for density in (0.0, 1.5):
        wrong = dataclasses.replace(run, grid=grid.Grid((), 0, (), (density,)))
        with pytest.raises(ValueError, match=r"target_density=.*expected above 0"):
            wrong.check()


@dataclasses.dataclass(frozen=True)
class Setting:
    """The part of a run that a search looks at, besides trials."""

    config: ImageConfig
    out: Path
    located: Path | None = None
    console: Console = dataclasses.field(default_factory=lambda: Console(quiet=True))
    objective = Classification()
