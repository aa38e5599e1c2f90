"""Cells from when LoRA's factors did not decay are no seeds of later ones."""

import json
import re
from pathlib import Path

import jax
import pytest
import tiny
from flax import nnx
from rich.console import Console

from experiments import cells, comparison, finished, report, run
from experiments.comparison import Comparison, Row, Table
from experiments.config import RunConfig

RESULTS = Path(__file__).parents[1] / "experiments/results/comparison"
OLD = {"seeds": {"0": {"test_accuracy": 0.5, "trainable": 5}}, "chosen": {"lr": 1e-3}}


def column(made, label):
    return next((c["tasks"] for c in made["columns"] if c["method"] == label), None)


@pytest.mark.parametrize("random", ["", "_random"])
@pytest.mark.parametrize(
    "method, label", [("spt_lora", "SPT-LoRA-8"), ("noah", "NOAH")]
)
def test_an_old_cell_gets_no_new_seeds(tmp_path, method, label, random):
    """The table has both, under two labels; what is new has a folder of its own."""
    table = Table(Comparison(out=tmp_path))
    table.store.keep("digits", method + random, OLD)
    where = []

    def train(out, seed, chosen):
        where.append(out.relative_to(tmp_path).as_posix())
        return {"test_accuracy": 0.9, "trainable": 5}

    def search(place):
        return {"chosen": {"lr": 3e-3}}

    row = Row(method, random=bool(random))
    cell, quiet = ("digits", row.name), Console(quiet=True)
    assert cells.attempt("", table.store, cell, (0, 1), search, train, quiet) is None
    assert where == [f"runs/digits/{method}_decayed{random}/seed{i}" for i in (0, 1)]
    assert table.store.rows("digits")[method + random] == OLD
    made, random = table.made(), ", random weights" if random else ""
    old = column(made, f"{label}, factors without decay{random}")
    assert old["digits"]["seeds"] == {"0": 0.5}
    assert column(made, f"{label}{random}")["digits"]["seeds"] == {"0": 0.9, "1": 0.9}
    memory = {method: {"total_bytes": 1}}
    points = {p["method"]: p["accuracy"] for p in table.points(made, memory)}
    assert points == ({} if random else {label: pytest.approx(90), f"{label}*": 50})


def test_other_methods_have_one_row():
    names = [row.name for row in comparison.ROWS]
    assert len(names) == len(set(names)) == 2 * (len(comparison.METHODS) + 2)
    assert "lora" in names and "lora_decayed" not in names


def test_the_committed_table_says_so():
    text = (RESULTS / "report.md").read_text("utf-8")
    for label, accuracy in (("SPT-LoRA-8", "76.1"), ("NOAH", "77.3")):
        row = re.search(rf"\| {label}, factors without decay \|.*", text)
        assert row and accuracy in row[0]
        assert not re.search(r"\d\d\.\d", re.search(rf"\| {label} \|.*", text)[0])


@pytest.mark.parametrize("method", ["spt_lora", "noah", "lora"])
def test_run_folders_of_then_and_now_are_not_mixed(tmp_path, method):
    for seed, decayed in enumerate((None, 77)):
        out = tmp_path / str(seed)
        out.mkdir()
        values = run.configs.as_dict(RunConfig(task="digits", seed=seed))
        result = {"test_accuracy": 0.5, "trainable": 99, "decayed": decayed}
        summary = {"methods": {method: result}}
        (out / "config.json").write_text(json.dumps(values))
        (out / "summary.json").write_text(json.dumps(summary))
    runs = finished.collect([tmp_path])
    if method == "lora":
        assert column(report.table(runs), "LoRA-8")["digits"]["deviation"] == 0
    else:
        with pytest.raises(ValueError, match="but differ in decay of LoRA's factors"):
            report.table(runs)


def test_a_result_counts_what_decays():
    """LoRA's factors and the head's kernel: neither its bias nor the class token."""
    model = tiny.adapted("lora")
    sizes = tiny.sizes(model) | {"": 0}
    state = nnx.state(model, nnx.Param)
    rank, width, hidden = 8, 8, 32
    factors = 2 * rank * (4 * (width + width) + 2 * (width + hidden))
    expected = factors + width * 3
    assert run._decayed(tiny.CONFIG.recipe("lora"), model) == expected
    assert run._size(state) == expected + sizes["head/bias"] + sizes["cls_token"]
    assert all(leaf.ndim for leaf in jax.tree.leaves(state))
