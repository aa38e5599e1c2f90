"""Runs on a concept: a tiny model, from photographs to pictures, killed and resumed."""

import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny_sd3
from flax import nnx
from PIL import Image
from places import ROOT
from rich.console import Console

import snella_jax as snella
from experiments import dreambooth, report
from experiments.config import command_line
from experiments.config.dreambooth import DREAMBOOTH, DreamboothConfig
from experiments.methods.registry import METHODS, OF_MMDIT
from experiments.runs import dreambooth as runs
from experiments.tasks.dreambooth import prompts
from experiments.training import evaluation, latents, metric_log, pictures
from experiments.training.vendi import vendi

STEPS, EACH = 12, 2
# Four matrices of fourteen: a step with all takes twice as long to compile.
TARGETS = "(blocks|last)/(image/attn/proj|context/attn/v)"
PROGRAM = "python -m experiments.dreambooth"


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """The tiny model and its judges, in the places of those with weights."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_sd3.install(patch)
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A short run's options."""
    folder = tiny_sd3.photographs(tmp_path_factory.mktemp("concept") / "mug")
    return [
        *("--config=toy", f"--subject={folder}", "--class_name=mug"),
        *(f"--size={tiny_sd3.SIDE}", f"--steps={STEPS}", "--sampler_steps=2"),
        *(f"--pictures={EACH}", "--draw_batch=10", "--accumulate=1"),
        *("--methods", "snella", "--snella.lr=0.03", f"--targets={TARGETS}"),
    ]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, dreambooth.main([*words, f"--out={out}"])


@pytest.fixture(scope="module")
def ready(words):
    """What a run needs, before it begins."""
    return prepared(words)


def parsed(words):
    """The config that a command line means."""
    return command_line.parse(PROGRAM, DREAMBOOTH, words)[1]


def prepared(words, *more):
    return runs.prepared("toy", parsed([*words, *more]), Console(quiet=True))


def bits(out):
    """The bytes of SNELLA's pictures, by name."""
    return {p.name: p.read_bytes() for p in (out / "pictures/snella").iterdir()}


def unit(rows):
    rows = rows.reshape(len(rows), -1) + np.float64(1)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_a_run_measures_the_pictures_that_it_draws(whole, ready):
    out, summary = whole
    result = summary["methods"]["snella"]
    names = ["image_alignment", "lightness", "vendi_prompt", "vendi_concept", "loss"]
    assert [metric["name"] for metric in summary["metrics"]] == names
    made = json.loads((out / "report.json").read_text("utf-8"))
    assert made["concept"] == "mug" and made["photographs"] == 5
    (row,) = made["rows"]
    centres = ready.task.concept.photographs.centres
    drawn = pictures.read(out / "pictures/snella", 25, EACH).reshape(-1, 8, 8, 3)
    own, seen = unit(drawn), unit(centres)
    expected = {
        "image_alignment": (own @ seen.T).mean(),
        "lightness": (drawn / 256 + 1 / 256).mean(),
        "vendi_prompt": np.mean([vendi(pair) for pair in own.reshape(25, EACH, -1)]),
        "vendi_concept": vendi(own),
    }
    for name, value in expected.items():
        assert row[name] == result[f"test_{name}"] == pytest.approx(value, rel=1e-5)
    assert "| SNELLA |" in (out / "report.md").read_text("utf-8")
    for name in ("sheet", "curves", "allocation", "sparsity"):
        assert (out / f"figures/{name}.png").stat().st_size > 10_000


def test_the_loss_falls_and_budgets_move_at_least_ten_times(whole, ready):
    out, summary = whole
    rows = metric_log.of(out, "snella")
    assert rows[-1]["updates"] == STEPS and len({row["lr"] for row in rows}) == 1
    assert sum(row.get("moves", 0) for row in rows) >= 10
    assert rows[-1]["density"] == pytest.approx(0.3, abs=0.01)
    where = ready.latents, ready.data.transform, ready.mesh, ready.objective
    before = evaluation.evaluate(ready.base, *where).metrics["loss"]
    assert summary["methods"]["snella"]["test_loss"] < 0.99 * before


def test_what_snella_changed_is_kept(whole):
    """The file of differences makes of the base what the kept adapter merges to."""
    out, summary = whole
    base = tiny_sd3.model()
    place = out / summary["methods"]["snella"]["delta"]
    tuned = snella.apply_delta(base, place)
    adapted = snella.merge(snella.load(base, out / "adapters" / "snella"))
    for one, other in zip(
        *(jax.tree.leaves(nnx.state(x, nnx.Param)) for x in (tuned, adapted)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    moved = OF_MMDIT["snella"].moved(
        base, tuned, DreamboothConfig(targets=TARGETS).scope()
    )
    assert moved == summary["methods"]["snella"]["weights_moved"] > 0


def test_a_picture_depends_on_seed_prompt_and_number_alone(whole):
    """Drawn beside others in another order it is the same, but for rounding."""
    out, summary = whole
    tuned = snella.apply_delta(
        tiny_sd3.model(), out / summary["methods"]["snella"]["delta"]
    )
    asked, pipeline = prompts("sks", "mug"), tiny_sd3.pipeline().with_transformer(tuned)
    places = [(prompt, number) for number in (1, 0) for prompt in (24, 3, 11, 0, 7)]
    keys = [pictures.key_of(0, asked[prompt], number) for prompt, number in places]
    texts = pipeline.encode([asked[prompt] for prompt, _ in places])
    how = {"steps": 2, "size": tiny_sd3.SIDE, "guidance": 3.0}
    drawn = np.asarray(pipeline(texts, key=jax.numpy.stack(keys), **how), int)
    for place, found in zip(places, drawn, strict=True):
        with Image.open(pictures.path(out / "pictures/snella", *place)) as own:
            assert np.abs(np.asarray(own, int) - found).max() <= 1
    keys = {
        tuple(jax.random.key_data(pictures.key_of(*given)).tolist())
        for given in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))
    }
    assert len(keys) == 4


def test_a_run_that_stopped_while_drawing_ends_with_the_same_pictures(
    whole, tmp_path, monkeypatch
):
    """Files are written one by one; what was there stays, the rest is drawn again."""
    out, before = whole
    broken = tmp_path / "broken"
    shutil.copytree(out, broken)
    for name in ("results.json", "summary.json"):  # as after training
        (broken / name).unlink()
    drawn = sorted((broken / "pictures/snella").iterdir())
    kept = {path: path.stat().st_mtime_ns for path in (*drawn[:3], *drawn[4:23])}
    for path in drawn:
        if path not in kept:
            path.unlink()
    inner, count = pictures.whole_file, [0]

    def until(path):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return inner(path)

    resume = ["--resume", str(broken)]
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "whole_file", until)
        with pytest.raises(SystemExit, match="Go on with it by --resume"):
            dreambooth.main(resume)
    assert len(bits(broken)) == 22 + 2 and not (broken / "results.json").exists()
    summary = dreambooth.main(resume)
    assert bits(broken) == bits(out) and len(bits(out)) == 25 * EACH
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert summary["methods"] == before["methods"]


def test_runs_are_reported_by_concept(whole, tmp_path):
    out, summary = whole
    made = report.main([str(out), "--out", str(tmp_path / "report")])
    (column,) = made["columns"]
    assert list(made["tasks"]) == ["mug"] and column["method"] == "SNELLA-4"
    value = column["tasks"]["mug"]["mean"]
    assert value == summary["methods"]["snella"]["test_image_alignment"]
    (column,) = report.main([str(out), "--metric=vendi_prompt"])["columns"]
    value = column["tasks"]["mug"]["mean"]
    assert value == summary["methods"]["snella"]["test_vendi_prompt"]
    with pytest.raises(SystemExit, match="no metric 'dice': expected one of image_al"):
        report.main([str(out), "--metric=dice"])


def test_only_the_transformer_stays_in_memory(words, monkeypatch):
    """An encoder of 4 MB and all that it made are gone, or on the host."""
    tiny_sd3.install(monkeypatch, encoder_size=1_000_000)
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    run = prepared(words)
    gc.collect()
    new = [array for array in jax.live_arrays() if id(array) not in before]
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(run.base)))
    assert own <= sum(array.nbytes for array in new) < 1.05 * own + 1000


def test_the_class_is_drawn_by_the_base_and_kept(ready, tmp_path):
    config = dataclasses.replace(ready.config, prior=0.5, class_pictures=3)
    run = dataclasses.replace(ready, config=config, out=tmp_path)
    prior = run.data.augment.prior
    kept = pictures.read(tmp_path / "class_pictures", 1, 3)[0]
    expected = latents.moments(None, kept)["mean"]
    np.testing.assert_array_equal(prior.moments["mean"], expected)
    assert len(np.unique(kept.reshape(3, -1), axis=0)) == 3
    text = tiny_sd3.Encoder().encode(["a photo of mug"])
    np.testing.assert_array_equal(prior.text["context"], text[0][0])
    assert run.objective.prior_weight == 0.5
    example = run.data.augment.prepare(run.latents[0], np.random.default_rng(0))
    assert {*example} == {
        *("mean", "context", "pooled"),
        *("prior_mean", "prior_context", "prior_pooled"),
    }
    assert not any((example["prior_mean"] == x).all() for x in run.moments["mean"])
    assert "prior_mean" not in ready.data.augment.prepare(ready.latents[0], None)


class Codec(nnx.Module):
    """Moments that a picture's pixels say."""

    def __init__(self):
        self.weight = nnx.Param(jax.numpy.float32(2))

    def encode(self, images):
        return self.weight * images[:, ::2, ::2], images[:, 1::2, 1::2] - 3


def test_moments_are_the_autoencoders_of_pixels_from_minus_one_to_one():
    images = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8)
    found = latents.moments(Codec(), images)
    pixels = images / 127.5 - 1
    for own, expected in (
        (found["mean"], 2 * pixels[:, ::2, ::2]),
        (found["logvar"], pixels[:, 1::2, 1::2] - 3),
    ):
        assert isinstance(own, np.ndarray) and own.dtype == np.float32
        np.testing.assert_allclose(own, expected, atol=1e-6)
    np.testing.assert_allclose(latents.moments(None, images)["mean"], pixels, atol=1e-6)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--methods=ssf", "blocks of one stream"),
        ("--methods=linear", "head of classes, and an MMDiT has none"),
        ("--methods=mixk", "is snella with --snella.gate none"),
        ("--methods=lorra", "did you mean lora"),
        ("--search", "nothing to choose by"),
        ("--steps=None", "length of a run in updates"),
        ("--ema=0.9", "drawn by one process, of the trained weights"),
        ("--pictures=0", "pictures=0: expected at least 1"),
        ("--prior=-1", "expected a weight of at least 0"),
        ("--token= ", "expected words"),
    ],
)
def test_what_no_run_can_be_is_said_before_it_begins(words, option, message):
    with pytest.raises(SystemExit, match=message):
        parsed([*words[:3], option])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--size=9", "size=9: expected a multiple of 2, up to 16"),
        ("--targets=last/context/attn/q", "never seen"),
        ("--mesh=data=4", "devices and accumulate"),
    ],
)
def test_what_does_not_fit_the_model_is_said_before_it_trains(words, option, message):
    with pytest.raises(ValueError, match=message):
        prepared(words, option, "--batch=5" if "mesh" in option else "--batch=4")


def test_every_method_is_one_of_an_mmdit_or_refused_with_a_reason():
    for name in METHODS:
        if name not in OF_MMDIT:
            assert f"{name} " in DreamboothConfig.no_method(name, PROGRAM)
            assert "lists all" not in DreamboothConfig.no_method(name, PROGRAM)


@pytest.mark.parametrize("name", OF_MMDIT)
def test_methods_adapt_an_mmdit(name):
    """A small share of it trains; full trains it whole, in float32 whatever it is."""
    half = dataclasses.replace(tiny_sd3.CONFIG, param_dtype=jax.numpy.bfloat16)
    base = tiny_sd3.model(config=half)
    scope, method = DreamboothConfig().scope(), OF_MMDIT[name]
    trained = nnx.eval_shape(lambda: nnx.state(method.adapt(base, scope), nnx.Param))
    leaves = jax.tree.leaves(trained)
    every = sum(x.size for x in jax.tree.leaves(nnx.state(base, nnx.Param)))
    assert all(leaf.dtype == np.float32 for leaf in leaves)
    size = sum(leaf.size for leaf in leaves)
    assert size == every if name == "full" else 0 < size < every


_PROGRAM = """
import sys, time
import pytest
import tiny_sd3
from experiments import dreambooth
from experiments.training import metric_log, pictures

tiny_sd3.install(pytest.MonkeyPatch())

def slow(function):
    def slowed(*given, **named):
        time.sleep(0.1)
        return function(*given, **named)
    return slowed

metric_log.log, pictures.whole_file = slow(metric_log.log), slow(pictures.whole_file)
dreambooth.main(sys.argv[1:])
"""


def killed(words, ready):
    """Runs until something is there, and then SIGKILLs, at other moments each time."""
    helpers = str(ROOT / "tests" / "helpers")
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *words],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), helpers])},
    )
    deadline = time.monotonic() + 1200
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(np.random.default_rng().uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_run_killed_in_training_and_in_drawing_ends_as_one_that_was_not(
    whole, words, tmp_path
):
    out, _ = whole
    broken = tmp_path / "broken"
    log, drawn = broken / metric_log.NAME, broken / "pictures/snella"
    resume = ["--resume", str(broken)]
    killed(
        [*words, f"--out={broken}"],
        lambda: log.exists() and log.read_text("utf-8").count("\n") >= 4,
    )
    assert not drawn.exists()
    killed(resume, lambda: drawn.exists() and len([*drawn.glob("??_??.png")]) >= 7)
    assert not (broken / "summary.json").exists()
    summary = dreambooth.main(resume)
    rows = [metric_log.of(folder, "snella") for folder in (out, broken)]
    for row in (*rows[0], *rows[1]):
        row.pop("seconds_per_step")
    assert rows[0] == rows[1] and len(rows[0]) == STEPS
    names = {path.name for path in drawn.glob("??_??.png")}
    assert {name: (drawn / name).read_bytes() for name in names} == bits(out)
    for name, value in whole[1]["methods"]["snella"].items():
        assert summary["methods"]["snella"][name] == value or name == "seconds_per_step"
