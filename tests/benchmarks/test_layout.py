"""A LLaMA's step on a mesh: what it computes, what lies where, the command."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.benchmarks import layout, memory, targets, workload
from experiments.training import blocks
from snella_jax import models

NAME = "llama2_7b"
MESH = "fsdp=2,tensor=2"
SUMS = ("all-reduce", "reduce-scatter")
COMMAND = ("--model", NAME, "--batch", "4", "--sequence", "12", "--rank", "4")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The model is a tiny one, with more heads of queries than of keys."""
    config = dataclasses.replace(
        models.PRESETS[NAME],
        vocab_size=48,
        width=16,
        depth=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp_dim=24,
    )
    monkeypatch.setitem(models.PRESETS, NAME, config)


def setting(method):
    return workload.Setting(
        *(method, NAME), batch=4, rank=4, remat="blocks", sequence=12,
        dtype="float32", frozen_dtype="float32",
    )  # fmt: skip


@functools.cache
def alone(method):
    """What trains, AdamW's state and the loss after a step on one device."""
    one = workload.build(setting(method))
    return jax.jit(one.run)(*one.arguments)


@pytest.mark.parametrize(
    "method, factors",
    [
        ("full", "split"),
        ("dora", "split"),
        ("snella", "split"),
        ("snella", "split on TPUs"),
        ("snella", "follow"),
        ("snella", "local"),
    ],
)
def test_a_step_on_a_mesh_is_that_of_one_device(method, factors, monkeypatch):
    """Loss, and gradient: after a step it is ten times the first moment of Adam.

    Of a matrix that is split by outputs, and one by inputs.
    """
    own = dataclasses.replace(workload.TEXTS, targets="blocks/.*/(q|down)")
    monkeypatch.setattr(workload, "TEXTS", own)
    factors, _, like_tpus = factors.partition(" on ")
    monkeypatch.setattr(blocks, "on_tpus", lambda mesh: bool(like_tpus))
    lay_out, used = blocks._laid_out, set()

    def noted(mesh, lying, lies, x):
        used.add(lies.spec)
        return lay_out(mesh, lying, lies, x)

    monkeypatch.setattr(blocks, "_laid_out", noted)
    mesh = "data=2,fsdp=2" if factors == "local" else MESH
    on = layout.make(mesh, jax.devices()[:4], 4, factors)
    spread = workload.build(setting(method), on)
    placed = jax.device_put(spread.arguments, spread.where)
    run = jax.jit(spread.run, out_shardings=(*spread.where[:2], on.whole))
    found, expected = run(*placed), alone(method)
    gathered = {P()} if factors == "split" and method != "full" else set()
    # Of the axes of pieces and rows; scalars are whole.
    rows = {P(None, "fsdp"), P(None, "tensor")} if like_tpus else set()
    assert used == gathered | rows
    assert abs(found[2] - expected[2]) < 1e-5 * expected[2]
    moments = [
        {
            jax.tree_util.keystr(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if ".mu" in jax.tree_util.keystr(path)
        }
        for state in (found[1], expected[1])
    ]
    largest = max(abs(leaf).max() for leaf in moments[1].values())
    assert largest > 1e-5
    for name, leaf in moments[1].items():
        np.testing.assert_allclose(moments[0][name], leaf, atol=1e-4 * largest)


@pytest.mark.parametrize("method", workload.OF_TEXTS)
def test_every_method_of_texts_has_a_layout(method):
    """Shapes alone: a step gives back what trains, laid out evenly, as it was."""
    on = layout.make(MESH, jax.devices()[:4], 4)
    one = workload.abstract(workload.checked(setting(method)), on)
    new_trainable, new_state, loss = jax.eval_shape(one.run, *one.arguments)
    shapes = [
        jax.tree.map(lambda v: (v.shape, v.dtype), tree)
        for tree in (one.arguments[:2], (new_trainable, new_state))
    ]
    assert shapes[0] == shapes[1] and loss.shape == ()
    parts = jax.tree.map(
        lambda v, at: at.shard_shape(v.shape), one.arguments, one.where
    )
    assert jax.tree.leaves(parts)


def test_what_lies_where():
    """Kernels are in four parts, factors and what AdamW keeps of them by `factors`."""
    devices = jax.devices()[:4]
    shapes = {
        "whole": ((2, 2, 16, 2), (2, 2, 24, 2)),
        "follow": ((2, 2, 8, 2), (2, 2, 12, 2)),
        "split": ((2, 2, 4, 2), (2, 2, 6, 2)),
    }
    for factors, (rows_in, rows_out) in shapes.items():
        on = layout.make(MESH, devices, 4, factors)
        one = workload.abstract(setting("snella"), on)
        trainable, state, budgets, frozen, batch, key = (
            {
                jax.tree_util.keystr(path, simple=True, separator="/"): (
                    where.shard_shape(leaf.shape)
                )
                for (path, leaf), where in zip(
                    jax.tree_util.tree_leaves_with_path(tree),
                    jax.tree.leaves(own),
                    strict=True,
                )
            }
            for tree, own in zip(one.arguments, one.where, strict=True)
        )
        up = "blocks/mlp/up"
        assert frozen[f"{up}/kernel/value"] == (2, 8, 12)
        assert frozen["blocks/mlp/down/kernel/value"] == (2, 12, 8)
        assert frozen["embed/embedding/value"] == (24, 8)
        assert frozen["head/kernel/value"] == (8, 24)
        assert frozen["blocks/norm1/scale/value"] == (2, 16)
        for tree in (trainable, state):
            a = {v for k, v in tree.items() if f"{up}/adapter/a/" in k + "/"}
            b = {v for k, v in tree.items() if f"{up}/adapter/b/" in k + "/"}
            assert (a, b) == ({rows_in}, {rows_out})
        assert set(budgets.values()) == {(2,)} and set(key.values()) == {()}
        assert set(batch.values()) == {(2, 12)}


def test_the_command_has_a_row_for_what_does_not_fit(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(targets.CAPACITY, "local", 10_000)
    command = [*COMMAND, "--chips", "4", "--mesh", MESH, "--out", str(tmp_path)]
    rows = memory.main([*command, "--method", "lora"])
    assert json.loads((tmp_path / "memory.json").read_text("utf-8")) == rows
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    row = rows[0]
    parts = ("argument_bytes", "temporary_bytes", "result_bytes")
    assert row["total_bytes"] == sum(row[part] for part in parts) > 10_000
    assert (row["fits"], row["chips"], row["remat"]) == (False, 4, "blocks")
    assert (row["mesh"], row["sequence"]) == ("data=1,fsdp=2,tensor=2", 12)
    # A block sums attention's and the MLP's outputs, forward and when it is recomputed,
    # and the gradients of their inputs.
    assert row["collectives"]["all-reduce"]["count"] >= 2 * (2 + 2)
    shown = capsys.readouterr().out
    assert " NO " in shown and "all-reduce" in shown


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--chips", "3"), "fsdp = 3 to divide batch=4"),
        (("--chips", "4", "--mesh", "fsdp=2"), "a mesh of chips=4"),
        (("--chips", "4", "--mesh", "rows=2"), "expected data=N, fsdp=N, tensor=N"),
        (("--chips", "64"), "there are 4 devices here"),
        (("--target", "h100", "--chips", "3"), "expected 1, 4, 16 for h100"),
        (("--method", "vqt"), "method=vqt: expected one of full"),
        (("--hbm", "1"), "hbm=1.0: expected GiB, and --target tpu-v5e"),
        (("--sequence", "1"), "sequence=1"),
        (("--model", NAME, "vit_b16"), "not vit_b16"),
        (("--chips", "4", "--factors", "local", "--mesh", "tensor=4"), "data and fsdp"),
    ],
)
def test_bad_meshes_are_refused_before_anything_runs(argv, message):
    with pytest.raises(SystemExit, match=message):
        memory.main([*COMMAND, *argv])


def test_methods_with_a_first_stage_have_no_mesh():
    with pytest.raises(SystemExit, match="--method spt_lora noah: expected methods"):
        memory.main(["--chips", "4", "--method", "lora", "spt_lora", "noah"])


@pytest.mark.tpu_compile
def test_a_tpu_has_no_room_for_full_fine_tuning(monkeypatch):
    """32 blocks of a 7 B model in float32, on one v5e of 16 GiB."""
    monkeypatch.undo()
    on = layout.make(None, targets.devices("tpu-v5e"), 8)
    full = workload.Setting("full", NAME, batch=8, remat="blocks", sequence=256)
    row = memory.row(full, "tpu-v5e", on)
    assert not row["fits"] and row["total_bytes"] > 12 * row["parameters"]


@pytest.mark.tpu_compile
def test_what_crosses_chips_beyond_loras(monkeypatch):
    """Two recomputed blocks of width 512 on four v5e: counts, and each gradient once.

    Nothing is gathered a third time, and a block's thresholds share 8 rounds of counts.
    """
    monkeypatch.undo()
    config = dataclasses.replace(
        models.PRESETS[NAME],
        vocab_size=1024,
        width=512,
        depth=2,
        heads=4,
        kv_heads=4,
        head_dim=128,
        mlp_dim=1408,
    )
    monkeypatch.setitem(models.PRESETS, NAME, config)
    on = layout.make("fsdp=4", targets.devices("tpu-v5e", 4), 8)
    lora, snella = (
        memory.row(
            workload.Setting(m, NAME, batch=8, remat="blocks", sequence=256),
            *("tpu-v5e", on),
        )["collectives"]
        for m in ("lora", "snella")
    )
    assert snella.keys() - lora.keys() == {"reduce-scatter"}
    gathered = [each["all-gather"]["bytes"] for each in (lora, snella)]
    assert gathered[1] < 1.03 * gathered[0]
    small = [each["all-reduce"]["small"] for each in (lora, snella)]
    assert 2 * 8 <= small[1] - small[0] <= 2 * 8 + 4
    gradients = 2 * 2 * (3 * 512 * 512 + 2 * 512 * 1408)  # q, k, v, up, down; bfloat16
    summed = [
        sum(each.get(kind, {"bytes": 0})["bytes"] for kind in SUMS)
        for each in (lora, snella)
    ]
    assert gradients < summed[1] - summed[0] < 1.05 * gradients
