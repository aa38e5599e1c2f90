"""Runs as users start them: protocols, searches, suites, and what interrupts them."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pictures
import pytest
from PIL import Image
from places import ROOT

from experiments import fgvc, vtab
from experiments.config import presets
from experiments.runs import run as runs
from experiments.runs import search, suite
from experiments.training import evaluation
from experiments.training.metric_log import Tracker
from experiments.training.session import Scope

VAL, TEST = 6, 10  # images of these splits; 16 train


def read(path):
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Words of a run of two epochs on small pictures."""
    root, each = tmp_path_factory.mktemp("short"), {"train": 8, "val": 3, "test": 5}
    return pictures.short(root, "--epochs=2", "--warmup_epochs=1", **each)


@pytest.fixture
def tested(monkeypatch):
    """The sizes of all sources that anything was evaluated on, in order."""
    sizes, inner = [], evaluation.batches

    def spy(source, *rest):
        sizes.append(len(source))
        return inner(source, *rest)

    monkeypatch.setattr(evaluation, "batches", spy)
    return sizes


# Presets


def test_every_task_of_the_benchmarks_has_the_released_settings():
    config = presets.VTAB["cifar100"].config
    own = config.settings["snella"]
    assert (config.batch, own.weight_decay) == (8, 0.05)
    densities = own.initial_density, own.target_density
    assert densities == (0.99, 0.2) and own.rank == 32
    epochs = config.epochs, config.warmup_epochs, config.cooldown_epochs
    assert epochs == (100, 10, 10)
    assert config.source == "the released code: SNELLA-32"
    assert presets.VTAB["sun397"].config.source == "the released code: SNELL-32"
    assert presets.VTAB["sun397"].config.epochs == 200
    assert presets.VTAB["svhn"].config.settings["snella"].gate == "none"
    dogs = presets.FGVC["dogs"].config
    assert (dogs.settings["snella"].lr, dogs.batch) == (1e-4, 32)
    assert (dogs.ema, dogs.crop) == (0.9999, "random")
    for preset in (*presets.VTAB.values(), *presets.FGVC.values()):
        preset.config.check()
        dataclasses.replace(preset.config, search=True).check()
        adapter = preset.config.settings["snella"].config(Scope("fc", "head"))
        assert adapter.rank in (8, 32)
    assert all(set(presets.SUITES[s]) <= set(p) for s, p in (
        ("vtab1k", presets.VTAB), ("fgvc", presets.FGVC)))  # fmt: skip


# Protocols


@pytest.mark.parametrize("protocol", ["choose", "final", "released"])
def test_protocols_train_follow_and_test_what_they_say(
    short, protocol, tmp_path, tested
):
    out = tmp_path / "run"
    options = ("--methods", "lora", "--protocol", protocol, "--ema", "0.9")
    summary = vtab.main([*short, "--out", str(out), *options])
    result = summary["methods"]["lora"]
    rows = [
        json.loads(x) for x in (out / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
    steps = {"choose": 4, "final": 5, "released": 5}[protocol]
    followed = {"choose": "validation", "released": "test"}
    assert summary["followed"] == followed.get(protocol)
    recipe = presets.QUICKSTART.config.recipe("lora")
    recipe = dataclasses.replace(recipe, epochs=2, warmup_epochs=1, batch=4)
    rounds = recipe.rounds(4 * steps)
    assert rows[-1]["lr"] == pytest.approx(float(recipe.rate(rounds)(2 * steps - 1)))
    followed = {"choose": [VAL] * 4, "final": [], "released": [TEST] * 4}[protocol]
    assert tested[: len(followed)] == followed  # two epochs, and their mean weights
    assert set(tested[len(followed) :]) == {TEST} and len(tested) <= len(followed) + 3
    assert 0 < result["ema_test_accuracy"] <= 1
    if protocol == "final":
        assert not any("accuracy" in key for row in rows for key in row)
        assert result["best_epoch"] is result["best_test_accuracy"] is None
        assert result["val_accuracy"] is None
    if protocol == "choose":
        accuracies = [row["val_accuracy"] for row in rows]
        assert result["val_accuracy"] == accuracies[-1]
        assert result["best_val_accuracy"] == max(accuracies)
    if protocol == "released":
        accuracies = [row["test_accuracy"] for row in rows]
        assert result["test_accuracy"] == pytest.approx(accuracies[-1], abs=2e-3)
        assert result["best_test_accuracy"] == max(accuracies)
    assert (out / "figures/curves.png").stat().st_size > 10_000
    assert list((out / "tensorboard/lora").glob("events*"))


def test_the_probe_runs_in_bfloat16_too(short, tmp_path):
    words = ["--methods", "linear", "--dtype", "bfloat16", "--linear.strengths", "0.3"]
    summary = vtab.main([*short, "--out", str(tmp_path / "run"), *words])
    assert summary["methods"]["linear"]["test_accuracy"] == 1


# Searches


def test_a_search_chooses_on_validation_and_tests_once(
    short, tmp_path, tested, monkeypatch
):
    """Interrupted in its third trial, it repeats none of the first two."""
    out, inner, fitted = tmp_path / "run", search.tune, []
    options = ["--methods", "linear", "snella", "--search", "--linear.strengths", "1"]
    # Of a rate that float32 rounds to 0 nothing is learnt.
    options += ["--grid.lr_factors", "1e-45", "--grid.lr_extensions", "0"]
    options += ["--grid.weight_decays", "0.05", "--grid.densities", "0.6"]

    def interrupt(method, setting):
        fitted.append(setting.config)
        with monkeypatch.context() as patch:
            if len(fitted) == 3:
                patch.setattr(Tracker, "log", log_and_stop)
            return inner(method, setting)

    def log_and_stop(tracker, row, log=Tracker.log):
        log(tracker, row)
        if len(tracker.rows) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(search, "tune", interrupt)
    with pytest.raises(SystemExit, match=f"Go on with it by --resume {out}"):
        vtab.main([*short, "--out", str(out), *options])
    assert TEST not in tested[3:]  # the probe's test came first
    assert (out / "search/snella/2/checkpoints/snella/1").exists()
    del tested[:]
    summary = vtab.main(["--resume", str(out)])
    trials = read(out / "search.json")["snella"]
    assert len(trials) == 4 and len(fitted) == 5
    own = presets.QUICKSTART.config.settings["snella"]
    lowest = pytest.approx(own.lr * 1e-45, rel=1e-6, abs=0)
    assert [t["lr"] for t in trials[:2]] == [own.lr, lowest]
    assert trials[0]["val_accuracy"] > trials[1]["val_accuracy"] == 0.5
    assert [t["weight_decay"] for t in trials[:3]] == [1e-4, 1e-4, 0.05]
    assert trials[3]["target_density"] == 0.6
    assert {config.protocol for config in fitted} == {"choose"}
    best = max(trials, key=lambda trial: trial["val_accuracy"])
    result = summary["methods"]["snella"]
    names = ("lr", "weight_decay", "target_density")
    assert result["settings"] == {name: best[name] for name in names}
    whole = 1 / pictures.WEIGHTS  # budgets are whole weights
    assert result["density"] == pytest.approx(best["target_density"], abs=whole)
    assert result["val_accuracy"] is None  # the final run trained on it
    assert tested == [VAL] * 3 + [TEST]  # an epoch, a trial of two epochs, the end
    assert not (out / "search/snella/0/checkpoints").exists()
    assert (out / "search/snella/0/metrics.jsonl").exists()


def test_a_trial_whose_loss_is_not_finite_has_failed(short, tmp_path):
    out = tmp_path / "run"
    options = ["--methods", "lora", "--search", "--grid.lr_factors", "1e30"]
    options += ["--grid.lr_extensions", "0"]
    vtab.main([*short, "--out", str(out), *options, "--grid.weight_decays"])
    trials = read(out / "search.json")["lora"]
    assert len(trials) == 2 and trials[1]["val_accuracy"] is None
    assert "not finite at step" in trials[1]["failed"]


# Suites


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two FGVC tasks as class folders of tiny pictures, one for each class."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for task, classes in (("flowers", 102), ("dogs", 120)):
        for part in ("train", "val", "test"):
            for index in range(classes):
                folder = root / task / part / f"class{index:03}"
                folder.mkdir(parents=True)
                pixels = rng.integers(0, 256, (9, 11, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "0.png")
    return root


MODEL = str(ROOT / "tests/assets/vit/classifier")


def fgvc_words(data, out, *more):
    words = ["--config", "fgvc", "--data_dir", str(data), "--out", str(out)]
    words += ["--model", MODEL, "--image_size", "24", "--mesh", "data=1"]
    words += ["--epochs", "2", "--warmup_epochs", "1", "--cooldown_epochs", "0"]
    return [*words, pictures.TARGETS, "--batch", "51", *more]


SNELLA = ("--methods", "snella", "--snella.rank", "2")


def test_a_suite_that_was_interrupted_goes_on(data, tmp_path, monkeypatch, capsys):
    out, inner = tmp_path / "suite", runs.run

    def interrupt(setting, resume):
        if setting.config.task == "dogs":
            raise KeyboardInterrupt
        return inner(setting, resume)

    words = fgvc_words(data, out, *SNELLA, "--tasks", "flowers", "dogs")
    monkeypatch.setattr(suite, "run", interrupt)
    with pytest.raises(SystemExit, match="Go on with it by --resume"):
        fgvc.main(words)
    first = (out / "flowers/summary.json").read_text("utf-8")
    assert not (out / "dogs/summary.json").exists()
    monkeypatch.setattr(suite, "run", inner)
    fgvc.main(["--resume", str(out)])
    assert (out / "flowers/summary.json").read_text("utf-8") == first
    summary = read(out / "dogs/summary.json")
    assert 0 <= summary["methods"]["snella"]["ema_test_accuracy"] <= 1
    report = (out / "report.md").read_text("utf-8")
    assert "| flowers |" in report and "| dogs |" in report
    assert "mean of tasks" in capsys.readouterr().out


def test_a_suite_names_all_that_is_missing_and_writes_nothing(data, tmp_path):
    out = tmp_path / "suite"
    with pytest.raises(SystemExit) as error:
        fgvc.main(fgvc_words(data, out))
    said = str(error.value)
    assert "3 of 5 tasks cannot be run; --tasks runs some" in said
    assert all(f"\n  {name}: " in said for name in ("cub", "nabirds", "cars"))
    assert not out.exists()
    with pytest.raises(SystemExit, match="no task of fgvc is called 'birds'"):
        fgvc.main(fgvc_words(data, out, "--tasks", "birds"))
    with pytest.raises(SystemExit) as help_text:
        fgvc.main(["--config", "fgvc", "--help"])
    assert help_text.value.code == 0
    with pytest.raises(SystemExit, match="19 of 19 tasks cannot be run"):
        vtab.main(
            ["--config", "vtab1k", "--data_dir", str(tmp_path), "--out", str(out)]
        )


def test_a_task_that_fails_does_not_stop_the_others(data, tmp_path):
    out = tmp_path / "suite"
    options = ["--methods", "lora", "--lora.lr", "1e30", "--tasks", "flowers", "dogs"]
    with pytest.raises(SystemExit) as error:
        fgvc.main(fgvc_words(data, out, *options))
    said = str(error.value)
    assert said.count("not finite") == 2 and "flowers" in said and "dogs" in said
    assert f"--resume {out}" in said


# Faults


def test_two_processes_do_not_share_a_folder(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text(
        json.dumps({"epochs": 2, "warmup_epochs": 1}), "utf-8"
    )
    holds = (
        "import filelock, sys, time\n"
        f"lock = filelock.FileLock({str(out / '.lock')!r}); lock.acquire()\n"
        "print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", holds], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(SystemExit, match="Another process is at work in"):
            vtab.main(["--resume", str(out)])
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert not (out / "results.json").exists()


@pytest.mark.slow  # a process that compiles by itself
def test_a_disk_that_is_full_leaves_what_is_done(short, tmp_path):
    """No file may grow beyond 10 kB, which a checkpoint is larger than."""
    out = tmp_path / "run"
    words = [*short, "--methods", "snella"]
    whole = vtab.main([*words, f"--out={tmp_path / 'whole'}"])["methods"]["snella"]
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "from experiments import vtab\n"
        "vtab.main(sys.argv[1:])"
    )
    # It loads the whole run's programs and writes none: the limit would cut them off.
    own = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
    process = subprocess.run(
        [sys.executable, "-c", program, *words, f"--out={out}"],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | own | {"PYTHONPATH": str(ROOT)},
    )
    assert process.returncode == 1
    assert "A checkpoint could not be written into" in process.stderr
    assert f"go on with --resume {out}" in process.stderr
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    assert json.loads(lines[0])["epoch"] == 1
    result = vtab.main(["--resume", str(out)])["methods"]["snella"]
    assert result["test_accuracy"] == whole["test_accuracy"]


def test_a_run_that_goes_on_elsewhere_says_so(short, tmp_path, capsys):
    out = tmp_path / "run"
    words = [*short, "--methods", "lora", "--out", str(out)]
    vtab.main(words)
    began = read(out / "environment.json")
    began["versions"]["jax"] = "0.9.0"
    (out / "environment.json").write_text(json.dumps(began), "utf-8")
    summary = vtab.main(["--resume", str(out)])
    said = " ".join(capsys.readouterr().out.split())
    assert "The run began on" in said and "'jax': '0.9.0'" in said
    assert summary["versions"]["jax"] == "0.9.0"
    assert summary["later"][0]["versions"]["jax"] == jax.__version__
