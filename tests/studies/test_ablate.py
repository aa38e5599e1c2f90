"""The ablations: what a variant changes, what is measured, and what the tables say."""

import dataclasses
import json
import typing
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pictures
import pytest
from flax import nnx
from rich.console import Console

from experiments import ablate, files
from experiments.config.images import ImageConfig
from experiments.data.source import Arrays
from experiments.methods.snella import Snella
from experiments.reports import paper
from experiments.runs.images import ImageRun
from experiments.studies import ablation_report
from experiments.studies.ablations import SNELLA, STUDIES, Variant
from experiments.studies.recorded import Trial, unpacked
from snella_jax.models.vit import ViT, ViTConfig

SHORT = ["--run.epochs", "2", "--run.warmup_epochs", "0", "--search_epochs", "2"]
GRID = ["--run.grid.lr_factors", "0.1", "--run.grid.lr_extensions", "0"]
SMALL = [*SHORT, *GRID, "--run.task=pets", f"--run.model={pictures.CLASSIFIER}"]
SMALL += [
    "--run.targets=blocks/mlp/fc1",
    "--run.image_size=24",
    "--run.batch=4",
    "--run.mesh=data=1",
]


def read(path):
    return json.loads(path.read_text("utf-8"))


def test_every_study_can_be_asked_for():
    assert set(typing.get_args(ablate.Name)) == set(STUDIES)
    assert ablate.Ablation().studies == tuple(STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_a_table(name):
    """Each row another setting; what is ordered or in the paper is a row."""
    study = STUDIES[name]
    titles = [variant.title for variant in study.variants]
    assert len(set(titles)) == len(titles)
    assert len({variant.name for variant in study.variants}) == len(titles)
    assert {title for order in study.order for title in order} <= set(titles)
    assert study.paper.keys() <= set(titles)
    for order in study.order:  # the paper's numbers have the paper's order
        known = [study.paper[title] for title in order if title in study.paper]
        assert known == sorted(known, reverse=True)
    for variant in study.variants:
        variant.config(ablate.RUN, seed=0).check()


def test_all_of_the_papers_numbers_are_in_a_study():
    sources = {study.source for study in STUDIES.values()}
    assert paper.ABLATIONS.keys() <= sources
    ordered = {study.source for study in STUDIES.values() if study.order}
    assert ordered == sources - {""}


def test_variants_that_are_the_same_are_one():
    """The default, by whatever name."""
    names = {
        variant.title
        for study in STUDIES.values()
        for variant in study.variants
        if variant.name == SNELLA.name
    }
    assert {"Mix-K, sparse", "across matrices", "cubic", "0.30"} <= names
    variants = ablate.Ablation().variants
    assert variants[0] == SNELLA
    assert len({variant.name for variant in variants}) == len(variants) == 84


def test_a_variant_changes_what_it_says():
    variant = Variant("x", {"rank": 4}, {"dtype": "bfloat16"})
    changed = variant.config(ImageConfig(), seed=7, lr=0.5)
    own = {"snella": Snella(rank=4, lr=0.5)}
    expected = dataclasses.replace(
        ImageConfig(), methods=("snella",), seed=7, dtype="bfloat16", settings=own
    )
    assert changed == expected
    assert variant.name == "snella,dtype=bfloat16,rank=4"
    assert variant.searched and Variant("y", {"gate": "soft"}).searched
    assert not Variant("y", {"rank": 4}).searched
    assert Variant("z", method="snella_masked").searched


def test_ablations_go_on_with_their_results_alone(tmp_path, monkeypatch, capsys):
    inner, runs = ablate.tune, []

    def interrupt(method, setting):
        runs.append((setting.config.settings["snella"], setting.config.seed))
        if len(runs) == 2:
            raise KeyboardInterrupt
        return inner(method, setting)

    monkeypatch.setattr(ablate, "tune", interrupt)
    monkeypatch.chdir(tmp_path)
    pictures.draw(tmp_path / "pets", each=16)
    first, second = tmp_path / "first", tmp_path / "second"
    options = [*SMALL, "--studies", "schedule", "--seeds", "0"]
    with pytest.raises(SystemExit, match="The same command goes on with it"):
        ablate.main([*options, "--out", str(first)])
    done = read(first / "results.json")["rows"]["pets"]
    assert [len(own.get("seeds", {})) for own in done.values()] == [1, 0]
    assert [trial["lr"] for trial in done["snella"]["trials"]] == [0.01, 0.001]
    second.mkdir()
    (second / "results.json").write_text(
        (first / "results.json").read_text("utf-8"), "utf-8"
    )
    ablate.main([*options, "--out", str(second)])
    assert [own.power for own, _ in runs] == [3, 3, 3, 1, 2]
    assert [own.initial_density for own, _ in runs] == [1, 0.3, 0.3, 1, 1]
    rate = done["snella"]["chosen"]["lr"]
    assert {own.lr for own, _ in runs} == {rate}
    own = read(second / "results.json")["rows"]["pets"]["snella"]["seeds"]["0"]
    assert own["density"] == pytest.approx(0.3, abs=1e-3) and own["moves"] == 1
    assert len(own["gradient_norms"]) == 2 and 0 < own["change"] < 1
    assert 1 <= own["rank"] <= 96 and 0 <= own["dead"] <= 0.7
    report = (second / "report.md").read_text("utf-8")
    assert (
        "| cubic | 63.88 | " in report and "The paper has cubic > quadratic" in report
    )
    assert (second / "schedule.png").stat().st_size > 10_000
    assert not (second / "rank.png").exists() and "| – |" in report  # noqa: RUF001

    del runs[:]
    ablate.main([*options, "--out", str(second)])
    ablate.main([*options, "--out", str(second), "--table_only"])
    assert not runs
    with pytest.raises(SystemExit, match="was made with another epochs:"):
        ablate.main([*options, "--out", str(second), "--run.epochs", "3"])


def test_updates_are_measured_by_hand():
    """A matrix that stays, one of rank 2 and one that moves in a single weight."""
    architecture = ViTConfig(
        width=8, depth=3, heads=2, patch_size=4, image_size=8, channels=1, num_classes=2
    )
    base = ViT(architecture, rngs=nnx.Rngs(0))
    merged = nnx.clone(base)
    kernel = merged.blocks.attn.query.kernel
    rng = np.random.default_rng(0)
    moved = np.zeros((3, 8, 8), np.float32)
    moved[1] = rng.normal(size=(8, 2)) @ rng.normal(size=(2, 8))
    moved[2, 3, 4] = 5.0
    before = np.asarray(kernel[...])
    kernel[...] = jnp.asarray(before + moved)
    run = ImageConfig(targets="blocks/attn/query")
    setting = ImageRun(run, None, base, None, None, None)
    found = ablate._updates(setting, merged)
    assert found["density"] == pytest.approx(65 / 192)
    assert found["dead"] == found["full"] == pytest.approx(1 / 3)
    assert found["rank"] == 1.0
    ratios = np.linalg.norm(moved, axis=(1, 2)) / np.linalg.norm(before, axis=(1, 2))
    assert found["change"] == pytest.approx(ratios.mean(), rel=1e-5)


def test_a_choice_is_made_without_the_test():
    """Each row has its own rate, around the base's or LoRA's, and a name of its own."""
    config = ablate.Ablation(studies=("centred",))
    assert SNELLA not in config.variants and all(v.validated for v in config.variants)
    tested = {own.name for own in ablate.Ablation(studies=("gates",)).variants}
    assert not tested & {own.name for own in config.variants}
    for variant in config.variants:
        assert variant.searched and not variant.config(config.run, 0).trains_on_all
        product = "product" in variant.title or "paper" in variant.title
        assert variant.centre == (1 if product else 0.1)


def test_validated_rows_take_the_rate_of_the_lowest_loss(tmp_path, monkeypatch):
    (variant,) = (v for v in STUDIES["centred"].variants if v.title == "hard gate")
    config = ablate.Ablation(studies=("centred",))
    trials = [{"lr": 1e-3, "val_loss": 0.5}, {"lr": 3e-4, "val_loss": 0.6}]

    def prepared(task, own, console, kind):
        assert kind is Trial and own.settings["snella"].lr == pytest.approx(1e-3)
        return SimpleNamespace(config=own, inputs={})

    def chosen(method, setting):
        files.write(tmp_path / "search.json", {method: trials})
        return setting.config

    monkeypatch.setattr(ablate.images, "prepared", prepared)
    monkeypatch.setattr(ablate.search, "chosen", chosen)
    store = SimpleNamespace(begin=lambda *_: None)
    found = ablate._searched(variant, config, store, tmp_path, Console(quiet=True))
    assert found == {"trials": trials, "chosen": {"lr": pytest.approx(1e-3)}}


@pytest.mark.parametrize("protocol, split", [("choose", "val"), ("final", "test")])
def test_one_split_is_looked_at(protocol, split, monkeypatch):
    """The other is not there; and every image of it is kept."""
    images = Arrays(np.zeros((3, 1, 1, 1), np.uint8), np.array([0, 1, 0]))
    splits = {"val": "validation", "test": "test"}
    task = SimpleNamespace(**{splits[split]: images})
    config = ImageConfig(protocol=protocol)
    own = SimpleNamespace(config=config, task=task, mesh=None, data=SimpleNamespace())
    own.data.transform, own.out = None, None
    row = {"epoch": 1, "train_loss": 0.1, "val_loss": 0.2, "gradient_norm": 1.0}
    fitted = SimpleNamespace(model=None, rows=[row], last_row=row)

    def evaluate(model, source, transform, mesh, objective, look):
        for index in range(len(source)):
            look(index, np.int32(0))

    monkeypatch.setattr(Snella, "merged", lambda *_: None)
    monkeypatch.setattr(ablate, "tune", lambda *_: fitted)
    monkeypatch.setattr(ablate, "_updates", lambda *_: {})
    monkeypatch.setattr(ablate.folder, "environment", lambda _: {})
    monkeypatch.setattr(ablate.metric_log, "median", lambda *_: None)
    monkeypatch.setattr(ablate.evaluation, "evaluate", evaluate)
    found = ablate.measured("snella", own)
    assert found[f"{split}_accuracy"] == pytest.approx(2 / 3)
    assert unpacked(found["right"], found["tested"]).tolist() == [True, False, True]
    assert ("val_loss" in found) == (split == "val")


def row(title, *accuracies):
    seeds = {str(seed): value for seed, value in enumerate(accuracies)}
    return {"title": title, "seeds": seeds, "mean": np.mean(accuracies)}


def test_an_order_holds_by_pairs_of_seeds():
    """The seeds' own ups and downs cancel in the differences."""
    clear = [row("A", 70.0, 80.0, 90.0), row("B", 69.0, 79.1, 88.9)]
    text = "The paper has A > B; this holds here (+1.0 ± 0.2 points)."
    assert ablation_report._verdict(clear) == text
    unclear = [*clear, row("C", 75.0, 79.0, 80.0)]
    text = ablation_report._verdict(unclear)
    assert "here it cannot be told (+1.0 ± 0.2, +1.0 ± 18.6 points)." in text
    text = ablation_report._verdict(clear[::-1])
    assert text == "The paper has B > A; this does not hold here (-1.0 ± 0.2 points)."
    missing = [*clear, {"title": "C", "seeds": {}}]
    assert ablation_report._verdict(missing).endswith("not all of it was run.")
    single = [row("A", 70.0), row("B", 69.0)]
    assert "cannot be told (+1.0 points)" in ablation_report._verdict(single)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--studies"], "at least one study and one seed"),
        (["--search_epochs", "3"], "search_epochs=3: expected more than the 3"),
        (["--run.dtype", "bfloat16"], "run.dtype: the ablation sets it by itself"),
        (["--run.task", "digitz"], "digitz"),
        (["--run.snella.rank", "4"], "run.snella: expected its lr and weight_decay"),
        (["--run.grid.densities", "0.1"], "only learning rates are searched"),
        (
            [*SHORT[:-1], "1"],
            "snella: its budget moves between rounds, of which there are 1",
        ),
        (["--run.targets", "nothing", "--run.task", "digits"], "targets='nothing'"),
    ],
)
def test_a_wrong_option_is_said_before_anything_runs(tmp_path, words, message):
    with pytest.raises(SystemExit, match=message):
        ablate.main([*words, "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
