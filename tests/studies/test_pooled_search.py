"""A comparison on folders, with one rate a method by pooled validation losses."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from pictures import CLASSIFIER, draw

import snella_jax as snella
from experiments import compare
from experiments.config.images import ImageConfig
from experiments.data.source import labels_of
from experiments.pretrained import base_models
from experiments.studies import pooled
from experiments.studies.recorded import unpacked
from experiments.tasks import catalogue
from experiments.training import evaluation, sharding
from experiments.training.classification import ByLoss, Classification

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
    how += ["--run.linear.strengths=1"]
    compare.main([*WORDS, *tasks, *how, f"--out={root / 'made'}"])
    return root


def read(path):
    return json.loads(path.read_text("utf-8"))


def model(folder, task, method):
    """The model that a run kept."""
    config = ImageConfig(model=str(CLASSIFIER), image_size=24)
    (path,) = folder.glob(f"made/runs/{task}*/{method}/seed0/{method}.delta*")
    return config, snella.apply_delta(base_models.load(config, 2), path)


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


@pytest.mark.parametrize("name", ["birds", "caltech101 (own)"])
def test_every_test_image_is_right_or_wrong(folder, name):
    """As the model that is kept says, image by image."""
    own = read(folder / "made/results.json")["rows"][name]
    short = name.removesuffix(" (own)")
    config, tuned = model(folder, short, "bias")
    task = catalogue.load(str(folder / "data" / short))
    seen = {}
    evaluation.evaluate(
        tuned,
        task.test,
        base_models.transforms(config, tuned)[1],
        sharding.make("data=1"),
        Classification(),
        look=seen.__setitem__,
    )
    result = own["bias"]["seeds"]["0"]
    right = unpacked(result["right"], result["tested"])
    truth = labels_of(task.test)
    assert result["tested"] == 10
    assert right.tolist() == [seen[i] == truth[i] for i in range(10)]
    linear = own["linear"]["seeds"]["0"]
    for one in (result, linear):
        whole = unpacked(one["right"], one["tested"])
        assert one["test_accuracy"] == pytest.approx(whole.mean())


def test_rates_of_another_comparison_are_taken_with_few_images(folder, tmp_path):
    """Nothing is searched, and two images of each class are trained on."""
    how = ["--tasks", "birds", "--pool", "--methods", "bias", "--run.per_class=2"]
    rates = [f"--rates={folder / 'made/results.json'}", f"--data={folder / 'data'}"]
    compare.main([*WORDS, *how, *rates, f"--out={tmp_path}"])
    found = read(tmp_path / "results.json")
    known = read(folder / "made/results.json")["rows"]["birds"]["bias"]["chosen"]
    assert found["rows"]["birds"].keys() == {"bias"}
    assert found["rows"]["birds"]["bias"]["chosen"] == known
    assert found["inputs"]["birds"]["data"]["train"]["images"] == 4
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
    config, tuned = model(folder, "birds", "bias")
    task = catalogue.load(str(folder / "data/birds"))
    transform = base_models.transforms(config, tuned)[1]
    found = evaluation.evaluate(
        tuned, task.test, transform, sharding.make("data=1"), ByLoss()
    ).metrics
    images = [transform.prepare(task.test[i], None)["image"] for i in range(10)]
    logits = np.asarray(tuned(np.stack(images)), np.float64)
    logits -= logits.max(1, keepdims=True)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = labels_of(task.test)
    loss = -np.log(chances[np.arange(10), truth]).mean()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == truth).mean())
