"""A comparison on folders: pooled rates, right test images, and models it keeps."""

import dataclasses
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pictures import CLASSIFIER, draw

from experiments import compare
from experiments.data.source import labels_of
from experiments.studies import (
    cells,
    clusters,
    grad_cam,
    pooled,
    sparsity,
    table_store,
    tuned,
)
from experiments.studies.corruptions import KINDS, SEVERITIES, Corrupted
from experiments.studies.recorded import unpacked
from experiments.training import evaluation, sharding
from experiments.training.classification import ByLoss
from snella_jax.nnx.variables import variables_of

# One matrix of each block: a step compiles in a third of the time.
WORDS = [
    "--config=real_tasks", f"--run.model={CLASSIFIER}", "--run.image_size=24",
    "--run.mesh=data=1", "--run.batch=4", "--run.targets=blocks/mlp/fc1",
    "--run.epochs=1", "--run.warmup_epochs=0", "--search_epochs=1", "--seeds=0",
    "--run.grid.lr_factors=10",
]  # fmt: skip


SUMMARY = {
    "methods": {"bias": {"test_accuracy": 0.5, "trainable": 5}},
    "device": "here",
    "versions": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks, one of them called as one of the catalogue's; `made` has results."""
    root = tmp_path_factory.mktemp("pooled")
    for name in ("birds", "caltech101"):
        draw(root / "data" / name, test=5)
    tasks = ["--tasks", "birds", "caltech101", "--pool", "birds", "caltech101"]
    how = ["--methods", "linear", "bias", "--keep_models", f"--data={root / 'data'}"]
    how += ["--run.linear.strengths=1", "--run.test_images=8"]
    compare.main([*WORDS, *tasks, *how, f"--out={root / 'made'}"])
    words = ["--runs", str(root / "made"), "--few", str(root / "made")]
    sparsity.main([*words, "--methods=bias", "--out", str(root / "out")])
    return root


def read(path):
    return json.loads(path.read_text("utf-8"))


def models(folder):
    return tuned.kept(cells.read([folder / "made"]))


def test_the_lowest_mean_loss_chooses_the_rate_of_every_task(folder):
    rows = read(folder / "made/results.json")["rows"]
    assert rows.keys() == {"birds", "caltech101 (own)"}
    rates = {name for name in rows["birds"] if "@" in name}
    assert rates == {"bias@0.003", "bias@0.03"}
    losses = {
        name: np.mean([own[name]["seeds"]["0"]["val_loss"] for own in rows.values()])
        for name in rates
    }
    best = min(losses, key=lambda name: losses[name])
    for own in rows.values():
        assert own["linear"]["chosen"] == {}
        assert f"bias@{own['bias']['chosen']['lr']:.3g}" == best
        (first, second) = own["bias"]["pooled"]
        assert first["val_loss"] == pytest.approx(losses["bias@0.003"])
        assert second["val_loss"] == pytest.approx(losses["bias@0.03"])
    config = read(next(folder.glob("made/runs/birds*/bias@0.03/seed0/config.json")))
    assert (config["protocol"], config["bias"]["lr"]) == ("choose", 0.03)


def guessed(model, source, transform):
    """Classes of all images at once, without a pipeline."""
    images = [transform(source[i]["image"], None) for i in range(len(source))]
    return np.asarray(model(jnp.stack(images)).argmax(-1))


def test_every_test_image_is_right_or_wrong(folder):
    """As the model that is kept says, image by image."""
    rows = read(folder / "made/results.json")["rows"]
    for one in models(folder):
        test = one.task.test
        found = guessed(one.model(), test, one.transform) == labels_of(test)
        assert one.cell.right.tolist() == found.tolist() and len(found) == 8
    for own in rows.values():
        for result in (own[name]["seeds"]["0"] for name in ("linear", "bias")):
            right = unpacked(result["right"], result["tested"])
            assert result["test_accuracy"] == pytest.approx(right.mean())


def test_methods_are_chosen_on_validation_alone(folder, tmp_path, capsys):
    """Without tasks nothing is tested: trials are all there is, and they are shown."""
    how = ["--tasks", "--pool", "birds", "--methods", "linear", "bias"]
    compare.main([*WORDS, *how, f"--data={folder / 'data'}", f"--out={tmp_path}"])
    own = read(tmp_path / "results.json")["rows"]["birds"]
    assert own.keys() == {"bias@0.003", "bias@0.03"}
    assert not (tmp_path / "report.md").exists()
    shown = capsys.readouterr().out
    losses = [own[name]["seeds"]["0"]["val_loss"] for name in own]
    assert f"{min(losses):.3f}*" in shown and f"{max(losses):.3f}" in shown
    with pytest.raises(SystemExit, match="at least one task"):
        compare.main([*WORDS, "--tasks", "--pool", f"--out={tmp_path / 'new'}"])


def test_rates_of_another_comparison_are_taken_with_few_images(folder, tmp_path):
    """Nothing is searched, and two images of each class are trained on."""
    how = ["--tasks", "birds", "--pool", "--methods", "bias", "--run.per_class=2"]
    rates = [f"--rates={folder / 'made/results.json'}", f"--data={folder / 'data'}"]
    compare.main([*WORDS, *how, *rates, f"--out={tmp_path}"])
    found = read(tmp_path / "results.json")
    known = read(folder / "made/results.json")["rows"]["birds"]["bias"]["chosen"]
    assert found["rows"]["birds"].keys() == {"bias"}
    assert found["rows"]["birds"]["bias"]["chosen"] == known
    assert found["inputs"]["birds, seed 0"]["data"]["train"]["images"] == 4
    result = found["rows"]["birds"]["bias"]["seeds"]["0"]
    assert result["best_epoch"] is None  # whose model would be tested, too
    with pytest.raises(SystemExit, match=r"no rate of lora for birds"):
        compare.main(
            [*WORDS, *how, "--methods=lora", *rates, f"--out={tmp_path / 'b'}"]
        )


def test_a_rate_that_diverges_is_not_chosen(folder, tmp_path, monkeypatch):
    """Nor tried again: a search that found no rate says so at once."""
    tried = []

    def tune(method, prepared):
        tried.append(prepared.config.settings[method].lr)
        if tried[-1] > 0.01 or len(tried) > 2:
            raise FloatingPointError("the loss is nan")
        row = {"val_loss": 0.7, "val_accuracy": 0.5, "train_loss": 0.6}
        return SimpleNamespace(last_row=row)

    monkeypatch.setattr(pooled, "tune", tune)
    monkeypatch.setattr(compare, "complete", lambda *_, **__: {**SUMMARY})
    how = [*WORDS, "--tasks=birds", "--pool=birds", f"--data={folder / 'data'}"]
    compare.main([*how, "--methods=bias", f"--out={tmp_path}"])
    own = read(tmp_path / "results.json")["rows"]["birds"]["bias"]
    assert own["chosen"] == {"lr": 0.003}
    assert [trial["val_loss"] for trial in own["pooled"]] == [0.7, None]
    for _ in range(2):
        with pytest.raises(SystemExit, match="lora, search: training diverged at"):
            compare.main([*how, "--methods=lora", f"--out={tmp_path}"])
    assert tried == pytest.approx([0.003, 0.03, 0.001, 0.01])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config=reel"], "no config 'reel'|reel"),
        (["--run.grid.lr_extensions=1"], "pool: only the rates"),
        (["--rates=results.json"], "pool and rates both choose"),
        (["--tasks", "a/b"], "a/b: expected names in data"),
        (["--methods=bias", "--run.per_class=0"], "per_class=0: expected at least 1"),
    ],
)
def test_wrong_words(words, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        compare.main([*WORDS, *words, f"--out={tmp_path / 'new'}"])
    assert not (tmp_path / "new").exists()


def test_loss_is_the_mean_cross_entropy(folder):
    one, _ = models(folder)
    model, test = one.model(), one.task.test
    where = test, one.transform, sharding.make("data=1"), ByLoss()
    found = evaluation.evaluate(model, *where).metrics
    images = [one.transform(test[i]["image"], None) for i in range(8)]
    logits = np.asarray(model(jnp.stack(images)), np.float64)
    logits -= logits.max(1, keepdims=True)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = labels_of(test)
    loss = -np.log(chances[np.arange(8), truth]).mean()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == truth).mean())


def test_the_sum_of_changes_is_tested_with_each_head(folder):
    """By the weights themselves: W0 + (A - W0) + (B - W0), and A's or B's head."""
    one, other = models(folder)
    base, a, b = (dict(variables_of(model, nnx.Param))
                  for model in (one.base, one.model(), other.model()))  # fmt: skip
    both = tuned.added(one.base, [one.model(), other.model()], head=other.model())
    for path, own in variables_of(both, nnx.Param):
        w0, wa, wb = (np.asarray(x[path][...]) for x in (base, a, b))
        head = path.startswith("head")
        np.testing.assert_allclose(own[...], wb if head else wa + wb - w0, atol=1e-6)
    key = f"{one.key} | {other.cell.task}"
    result = read(folder / "out/measured.json")["adding"][key][other.cell.task]
    right = guessed(both, other.task.test, other.transform)
    right = right == labels_of(other.task.test)
    assert unpacked(result["right"], 8).tolist() == right.tolist()


def test_every_measure_is_taken_once_and_reported(folder, monkeypatch, capsys):
    values = read(folder / "out/measured.json")
    assert {name: len(own) for name, own in values.items()} == {
        "sizes": 2, "forgetting": 2, "adding": 1, "robustness": 2
    }  # fmt: skip
    assert len(values["robustness"]["Bias | birds | 0"]) == len(KINDS) * len(SEVERITIES)
    forgot = values["forgetting"]["Bias | birds | 0 | caltech101 (own)"]
    assert forgot["tested"] == 8  # training images
    for name in ("forgetting", "adding", "robustness", "sizes"):
        monkeypatch.setattr(sparsity.keeping, name, None)
    words = ["--runs", str(folder / "made"), "--out", str(folder / "out")]
    sparsity.main([*words, "--methods=bias"])
    assert "Bias" in capsys.readouterr().out
    report = read(folder / "out/report.json")
    sizes = [one.delta.stat().st_size for one in models(folder)]
    assert report["sizes"]["Bias"]["delta file"] == pytest.approx(np.mean(sizes) / 1e6)
    right = [one.cell.right.mean() for one in models(folder)]
    assert report["corrupted"]["Bias"]["clean"] == pytest.approx(100 * np.mean(right))


def test_corrupted_images_are_tested_one_by_one(folder):
    one, _ = models(folder)
    source = Corrupted(one.task.test, one.transform, "blur", 5)
    right = guessed(one.model(), source, one.transform) == labels_of(one.task.test)
    found = read(folder / "out/measured.json")["robustness"][one.key]["blur 5"]
    assert unpacked(found["right"], found["tested"]).tolist() == right.tolist()


def test_other_test_images_are_refused(folder, tmp_path):
    for name in ("birds", "caltech101"):
        draw(tmp_path / name, test=2)
    one, _ = tuned.kept(cells.read([folder / "made"]), tmp_path)
    with pytest.raises(ValueError, match=r"has 4 test images, .* was tested on 8"):
        _ = one.task


def test_the_model_before_tuning_has_the_probes_head(folder):
    found = {cell.row.method: cell for cell in cells.read([folder / "made"])}
    probe = found["linear"]
    tasks = {own.cell.task: own for own in models(folder)}
    own = dataclasses.replace(tasks[probe.task], cell=probe)
    labels = labels_of(own.task.test).tolist()
    right = tuned.right(grad_cam.probed(own), own.task.test, own.transform, labels)
    assert right == probe.right.tolist()


def test_kept_models_are_drawn(folder, tmp_path, capsys):
    """Both tasks; their images have no masks."""
    words = ["--runs", str(folder / "made"), "--methods", "linear", "bias"]
    words += [f"--out={tmp_path}"]
    found = grad_cam.main([*words, "--examples=3"])
    labels = [tuned.BEFORE, "Bias"]
    assert [own["task"] for own in found["tasks"]] == ["birds", "caltech101 (own)"]
    assert all([*own["accuracy"]] == labels for own in found["tasks"])
    assert not any("inside" in own for own in found["tasks"])
    birds = ["--tasks=birds", "--perplexity=3", "--kmeans=2"]
    (own,) = clusters.main([*words, *birds])["tasks"]
    assert [*own["models"]] == labels and own["classes"] == 2
    assert all(0 <= value <= 1 for value in own["models"]["Bias"]["nmi"][0])
    said = " ".join(capsys.readouterr().out.split())
    assert "no model was kept: linear probe on birds, seed 0." in said
    with pytest.raises(SystemExit, match="less than the 8 test images of birds"):
        clusters.main([*words, "--tasks=birds"])
    with pytest.raises(SystemExit, match="No finished seed of dogs: expected"):
        grad_cam.main([*words, "--tasks=dogs"])


def test_a_single_setting_is_taken_without_a_trial(folder, tmp_path, monkeypatch):
    found = []

    def attempt(program, store, cell, seeds, search, train, console):
        found.append((cell, search(tmp_path)["chosen"]))

    monkeypatch.setattr(table_store, "attempt", attempt)
    how = ["--tasks=birds", "--methods=bias", "--pool", "--run.grid.lr_factors"]
    where = [f"--data={folder / 'data'}", f"--out={tmp_path / 'out'}"]
    compare.main([*WORDS[:-1], *how, *where])
    assert found == [(("birds", "bias"), {"lr": 3e-3, "weight_decay": 1e-4})]


def test_without_a_model_nothing_is_measured(folder, tmp_path):
    words = ["--runs", str(folder / "made"), "--out", str(tmp_path / "out")]
    for more, count in ((["--methods", "linear"], 2), (["--seeds", "1"], 0)):
        said = f"Of {count} finished seeds .* no model was"
        with pytest.raises(SystemExit, match=said):
            sparsity.main([*words, *more])
    assert not (tmp_path / "out").exists()
