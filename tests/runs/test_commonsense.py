"""Runs on questions: a tiny LLaMA, from records to a report, killed and resumed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import asked
import jax
import numpy as np
import pytest
import slowed
from places import ROOT

import snella_jax as snella
from experiments import commonsense, report
from experiments.config.language import LANGUAGE, LanguageConfig
from experiments.methods import registry
from experiments.methods.snella import Snella
from experiments.training import metric_log
from experiments.training.checkpoints import Checkpoints
from experiments.training.objective import Metric
from snella_jax.models import llama

METHODS = "untuned", "lora", "snella"
# Two matrices of a block: a step with all five takes twice as long to compile.
TARGETS = "blocks/.*/(q|up)"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A short run's options; every one has the same shapes."""
    folder = tmp_path_factory.mktemp("language")
    (folder / "prose.txt").write_text("The quick brown fox jumps. " * 9, "utf-8")
    return [
        *("--config=smollm2_small", f"--model={asked.language_model(folder)}"),
        *(f"--data={asked.folder(folder / 'data')}", "--mesh=data=1"),
        *(f"--prose={folder / 'prose.txt'}", "--prose_tokens=60"),
        *(
            f"--targets={TARGETS}",
            "--steps=12",
            "--round_steps=1",
            "--eval_every=5",
            "--validation=4",
        ),
    ]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    summary = commonsense.main([*words, f"--out={out}", "--scores", "label", "text"])
    return out, summary


def test_a_run_ends_with_a_report_of_every_test(whole):
    out, summary = whole
    results = summary["methods"]
    assert tuple(results) == METHODS and summary["metrics"][0]["name"] == "loss"
    made = json.loads((out / "report.json").read_text("utf-8"))
    rows = {(row["score"], row["method"]): row for row in made["rows"]}
    titles = [registry.title(method) for method in METHODS]
    labels = {("label", title) for title in ("majority answer", *titles)}
    texts = {(s, title) for s in ("text", "text_norm") for title in titles}
    assert rows.keys() == labels | texts
    assert rows["label", "majority answer"]["accuracies"] == {
        **{"larger": 3 / 5, "sums": 1 / 3, "mean": pytest.approx(7 / 15)},
    }
    for method, title in zip(METHODS, titles, strict=True):
        result, own = results[method], rows["label", title]["accuracies"]
        each = [result[f"test_accuracy_{test}"] for test in made["tests"]]
        assert own["mean"] == pytest.approx(np.mean(each)) == result["test_accuracy"]
    tuned, untuned = results["snella"], results["untuned"]
    assert tuned["val_loss"] < untuned["val_loss"]
    assert tuned["perplexity"] != untuned["perplexity"]
    assert untuned["trainable"] == untuned["weights_moved"] == 0
    text = (out / "report.md").read_text("utf-8")
    assert "| untuned |" in text and "20 records to train on, 4 to val" in text
    assert (out / "figures/accuracies.png").exists()
    config = json.loads((out / "config.json").read_text("utf-8"))
    base = llama.load(config["model"])
    adapted = snella.merge(snella.load(base, out / "adapters" / "snella"))
    moved = Snella().moved(base, adapted, LanguageConfig(targets=TARGETS).scope())
    assert moved == tuned["weights_moved"] > 0


def test_finished_runs_are_reported_by_test(whole):
    out, summary = whole
    made = report.main([str(out)])
    assert set(made["tasks"]) == {"larger", "sums"} and made["metric"]["percent"]
    for column, method in zip(made["columns"], METHODS, strict=True):
        for test, cell in column["tasks"].items():
            value = summary["methods"][method][f"test_accuracy_{test}"]
            assert cell["seeds"] == {"0": value} and cell["mean"] == 100 * value


def test_rounds_move_the_budget_and_few_are_evaluated(whole):
    out, _ = whole
    rows = metric_log.of(out, "snella")
    assert len(rows) == 12 and sum("budget" in row for row in rows) >= 10
    assert [row["epoch"] for row in rows if "val_loss" in row] == [5, 10, 12]


def last(out, method):
    """What the last checkpoint holds."""
    loss = Metric("loss", more_is_better=False)
    manager = Checkpoints(out / "checkpoints" / method, loss).manager
    found = manager.restore(manager.latest_step())
    manager.close()
    return jax.tree.leaves((found["state"], found["position"]))


@pytest.mark.slow  # a process, and two runs of four methods
def test_a_run_that_was_killed_ends_as_one_that_was_not(words, whole, tmp_path):
    """SIGKILL in the midst of SNELLA, after the others."""
    out, path = tmp_path / "broken", tmp_path / "broken" / metric_log.NAME
    options = [*words, f"--out={out}", "--scores", "label", "text"]
    process = subprocess.Popen(
        [sys.executable, "-c", slowed.program("commonsense"), *options],
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
    summary = commonsense.main(["--resume", str(out)])
    for method, result in whole[1]["methods"].items():
        found = summary["methods"][method]
        for name in result.keys() - {"seconds_per_step"}:
            assert found[name] == result[name], (method, name)
    for method in ("lora", "snella"):
        for one, other in zip(last(out, method), last(whole[0], method), strict=True):
            np.testing.assert_array_equal(one, other)


def test_answers_are_generated_on_request(words, tmp_path):
    """By a random model, which knows no keyword."""
    own = ["--methods", "untuned", "--scores", "label", "generated", "--limit=2"]
    out = tmp_path / "run"
    result = commonsense.main([*words, *own, f"--out={out}"])["methods"]["untuned"]
    assert result["test_generated"] == result["test_generated_sums"] == 0
    assert result["keywordless"] == {"larger": 2, "sums": 2}
    text = (out / "report.md").read_text("utf-8")
    assert "no keyword |" in text and "| untuned | 0.0 | 0.0 | 0.0 | 4 |" in text


def test_a_search_follows_validation_for_fewer_steps(words, tmp_path):
    own = ["--methods", "lora", "--search", "--search_steps=2", "--warmup_epochs=0"]
    own += ["--grid.lr_factors=3", f"--out={tmp_path / 'run'}"]
    summary = commonsense.main([*words, *own, "--steps=3", "--seed=1"])
    trials = json.loads((tmp_path / "run/search.json").read_text("utf-8"))["lora"]
    best = min(trials, key=lambda trial: trial["val_loss"])
    assert len(trials) == 2
    assert summary["methods"]["lora"]["settings"]["lr"] == best["lr"]


@pytest.mark.parametrize("method", ["bias", "noah"])
def test_what_a_decoder_has_no_place_for_is_refused(method, words, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(SystemExit, match="Leave the method out"):
        commonsense.main([*words, "--methods", method, f"--out={out}"])
    assert not out.exists()


def test_other_methods_train_a_decoder(words, tmp_path):
    """After a first stage by the same loss; tests/methods has every method's step."""
    chosen = ["gps", "spt_lora"]
    own = ["--methods", *chosen, "--steps=2", "--warmup_epochs=0", "--round_steps=1"]
    out = tmp_path / "run"
    results = commonsense.main([*words, *own, f"--out={out}"])["methods"]
    assert tuple(results) == tuple(chosen)
    assert all(result["trainable"] > 0 for result in results.values())
    assert all(result["weights_moved"] > 0 for result in results.values())


@pytest.mark.parametrize("name", LANGUAGE)
def test_presets_can_be_run(name, tmp_path):
    dataclasses.replace(LANGUAGE[name].config, data=tmp_path).check()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data=None"], "--data is missing"),
        (["--scores", "text"], "expected label among them"),
        (["--limit=0"], "limit=0: expected at least 1"),
        (["--model=smollm3"], "did you mean smollm2_135m"),
        (["--model=nothing/here"], "is called 'nothing/here'.* or a GGUF file"),
        (["--overlong=cut", "--loss_on=all"], "llm_adapters"),
        (["--template=llm_adapters", "--overlong=cut"], "no answer to learn"),
        (["--epochs=3"], "--epochs and --steps both give a run's length"),
    ],
)
def test_wrong_options_are_named(options, said, words, tmp_path):
    with pytest.raises(SystemExit, match=said):
        commonsense.main([*words, *options, f"--out={tmp_path / 'run'}"])
