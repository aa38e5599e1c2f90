"""Cells from when LoRA's factors did not decay are no seeds of later ones."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import pytest
import tiny
from flax import nnx
from places import RESULTS
from rich.console import Console

from experiments import files, terminal
from experiments.config import run_config
from experiments.config.images import ImageConfig
from experiments.methods import registry
from experiments.methods.spt import SptLora
from experiments.reports import finished
from experiments.reports import table as report
from experiments.runs import run
from experiments.studies import comparison, table_store
from experiments.studies.comparison import Comparison, Row, Table

COMPARISON = RESULTS / "comparison"
PLAIN = {"spt_lora": SptLora(weight_decay=0.0)}
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
    assert (
        table_store.attempt("", table.store, cell, (0, 1), search, train, quiet) is None
    )
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
    text = (COMPARISON / "report.md").read_text("utf-8")
    for label, accuracy in (("SPT-LoRA-8", "76.1"), ("NOAH", "77.3")):
        row = re.search(rf"\| {label}, factors without decay \|.*", text)
        assert row and accuracy in row[0]
        assert not re.search(r"\d\d\.\d", re.search(rf"\| {label} \|.*", text)[0])


@pytest.mark.parametrize("method", ["spt_lora", "noah", "lora"])
def test_run_folders_of_then_and_now_are_not_mixed(tmp_path, method):
    for seed, decayed in enumerate((None, 77)):
        out = tmp_path / str(seed)
        out.mkdir()
        values = run_config.as_dict(ImageConfig(task="digits", seed=seed))
        result = {"test_accuracy": 0.5, "trainable": 99, "decayed": decayed}
        summary = {"methods": {method: result}}
        (out / "config.json").write_text(json.dumps(values), "utf-8")
        (out / "summary.json").write_text(json.dumps(summary), "utf-8")
    runs = finished.collect([tmp_path], terminal.console())
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
    leaves = jax.tree.leaves(state)
    undecayed = sizes["head/bias"] + sizes["cls_token"]
    assert sum(leaf.size for leaf in leaves) == expected + undecayed
    assert all(leaf.ndim for leaf in leaves)


@pytest.mark.parametrize(
    "method, begun, change, refused",
    [
        ("spt_lora", "checkpoints/spt_lora/3", {}, True),
        ("noah", "checkpoints/noah/1", {}, True),
        ("noah", "checkpoints/noah_supernet/7", {}, True),
        ("spt_lora", "search/spt_lora", {"search": True}, True),
        ("spt_lora", "checkpoints/lora/3", {}, False),  # its own has no epoch yet
        ("spt_lora", "checkpoints/spt_lora", {}, False),
        ("spt_lora", "checkpoints/spt_lora/3", {"methods": ("lora",)}, False),
        ("spt_lora", "checkpoints/spt_lora/3", {"settings": PLAIN}, False),
    ],
)
def test_what_began_without_decay_does_not_end_with_it(
    tmp_path, method, begun, change, refused
):
    """But what is finished stays, and so do folders that know what they began with."""
    (tmp_path / begun).mkdir(parents=True)
    config = dataclasses.replace(ImageConfig(methods=("lora", method)), **change)
    inputs = {"data": {}, "classes": 2, "weights": {}}
    setting = SimpleNamespace(
        config=config,
        out=tmp_path,
        inputs=inputs,
        console=Console(quiet=True),
        unit="images",
    )
    if refused:
        with pytest.raises(
            files.MismatchError, match=f"{registry.title(method)} began in"
        ):
            run._same_inputs(setting, begun=True)
        assert not (tmp_path / "inputs.json").exists()
        files.write(tmp_path / "results.json", {method: {}})
    run._same_inputs(setting, begun=True)
    (tmp_path / "results.json").unlink(missing_ok=True)
    run._same_inputs(setting, begun=True)
