"""Descriptions of an adapted model agree with what merging it does."""

import dataclasses
import io

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import snella_jax as snella
from snella_jax.models.vit import ViT, ViTConfig
from snella_jax.nnx.coverage import coverage
from snella_jax.nnx.selection import weights_of

TINY = ViTConfig(
    width=8, depth=2, heads=2, patch_size=4, image_size=8, channels=1, num_classes=3
)


class Mixed(nnx.Module):
    """A fused qkv, attention's heads, a convolution, experts and a plain layer."""

    def __init__(self, rngs):
        self.qkv = nnx.Linear(6, 12, rngs=rngs)
        self.heads = nnx.LinearGeneral(12, (2, 3), rngs=rngs)
        self.conv = nnx.Conv(3, 5, (2, 2), rngs=rngs)
        self.experts = nnx.Einsum("bed,dem->bem", (4, 2, 6), (2, 6), rngs=rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)


LEFT = ("head", "patch_embed")  # of a ViT whose targets are in its blocks


def mixed(**options):
    config = snella.SnellaConfig(
        rank=4,
        targets="qkv|heads|conv|experts",
        trainable="head",
        allocation="fixed",
        target_density=0.4,
        overrides={"qkv": {"split": 3, "rank": 2}},
        **options,
    )
    return snella.adapt(Mixed(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))


def test_matrices_are_those_that_merging_changes():
    model = mixed()
    merged = snella.merge(model)
    updates = {
        name: np.asarray(getattr(merged, name).kernel[...])
        - np.asarray(getattr(model, name).kernel[...])
        for name in ("qkv", "heads", "conv", "experts")
    }
    base = np.asarray(model.qkv.kernel[...])
    expected = {
        **{f"qkv[{i}]": updates["qkv"][:, 4 * i : 4 * i + 4] for i in range(3)},
        "heads": updates["heads"].reshape(12, 6),
        "conv": updates["conv"].reshape(12, 5),
        **{f"experts[{i}]": updates["experts"][:, i] for i in range(2)},
    }
    found = {matrix.name: matrix for matrix in snella.sparsity(model)}
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        matrix = found[name]
        assert matrix.shape == update.shape
        assert matrix.moved == np.count_nonzero(update) == matrix.budget
        assert matrix.density == pytest.approx(0.4, abs=0.03)
        assert matrix.norm == pytest.approx(np.linalg.norm(update), rel=1e-4)
        assert matrix.rank == (2 if name.startswith("qkv") else 4)
        assert (matrix.kernel, matrix.gate, matrix.path) == (
            "mix_k",
            "product",
            "merged",
        )
    for i in range(3):
        own = np.linalg.norm(base[:, 4 * i : 4 * i + 4])
        assert found[f"qkv[{i}]"].base_norm == pytest.approx(own, rel=1e-5)
        change = found[f"qkv[{i}]"].norm / own
        assert found[f"qkv[{i}]"].change == pytest.approx(change, rel=1e-5)


def test_names_and_budgets_are_those_of_reallocate():
    config = snella.SnellaConfig(rank=4, target_density=0.3)
    model = snella.adapt(ViT(TINY, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    graphdef, trainable, budgets, frozen = snella.partition(model)
    tx = snella.track_importance()
    grads = jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(p.size), p.shape), trainable
    )
    _, state = optax.chain(tx).update(grads, (tx.init(trainable),), trainable)
    total = snella.adapted_weights(model) // 3
    budgets, report = snella.reallocate(budgets, state, total)
    found = snella.sparsity(nnx.merge(graphdef, trainable, budgets, frozen))
    by_name = {matrix.name: matrix.budget for matrix in found}
    assert by_name == dict(zip(report.names, report.budgets.tolist(), strict=True))


def test_a_model_is_described_in_a_table(capsys):
    model = mixed()
    snella.describe(model)
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line.rstrip()) <= len(lines[0]) for line in lines[:-2]}) == 1
    assert lines[0].split() == [
        "matrix", "shape", "rank", "budget", "density", "|delta|", "change",
    ]  # fmt: skip
    assert lines[-3].split()[:3] == ["all", "7", "101"]
    weights = 6 * 12 + 12 * 6 + 12 * 5 + 4 * 2 * 6
    biases = 12 + 6 + 5 + 12
    factors = 3 * 2 * (6 + 4) + 4 * (12 + 6 + 12 + 5 + 2 * (4 + 6))
    scalars = 7 * 4  # alpha, beta and two coefficients
    head = 6 * 2 + 2
    trainable, total = (
        factors + scalars + head,
        weights + biases + factors + scalars + head,
    )
    assert snella.parameters(model) == (trainable, total)
    assert lines[-2] == (
        f"trainable params: {trainable} || all params: {total} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )
    assert lines[-1] == (  # 252 of 264
        "7 of 8 matrices, 95.4% of the weights adapted; not adapted: head"
    )
    drops = mixed(path="parallel", dropout=0.5)
    before = snella.parameters(drops)
    snella.seed(drops, jax.random.key(0))  # whose keys are no parameters
    assert snella.parameters(drops) == before
    file = io.StringIO()
    snella.describe(model, file)
    assert file.getvalue().splitlines() == lines and not capsys.readouterr().out


@pytest.mark.parametrize(
    "layout",
    [
        snella.Layout((6,), (4,)),
        snella.Layout((2, 3), (4, 5)),
        snella.Layout((6,), (2, 4), (3,), order=(2, 0, 1, 3)),
        snella.Layout((6,), (12, 2)).split(3),
        snella.Layout((6,), (3, 4)).split(3),
    ],
)
def test_a_weight_is_taken_apart_as_it_was_put_together(layout):
    shape = (*layout.slices, *layout.inputs, *layout.outputs)
    matrices = np.arange(np.prod(shape), dtype=np.float32)
    weight = layout.place(jax.numpy.asarray(matrices.reshape(shape)))
    assert weight.shape == layout.shape
    expected = matrices.reshape(*layout.slices, layout.n, layout.m)
    np.testing.assert_array_equal(layout.matrices(weight), expected)


def test_what_measures_is_compiled_once():
    """Scores that are taken in every step must not be."""
    calls = []

    def measure(delta):
        calls.append(delta.shape)
        return delta.sum()

    weight = weights_of(mixed())[0]
    first = weight.per_matrix(measure)
    traced = len(calls)
    fewer = dataclasses.replace(weight, budget=weight.budget // 2)
    assert fewer.per_matrix(measure) != first and len(calls) == traced > 0


def test_there_has_to_be_an_adapter():
    with pytest.raises(ValueError, match="has no adapters"):
        snella.sparsity(Mixed(nnx.Rngs(0)))


def test_a_model_without_adapters_is_described():
    snella.describe(Mixed(nnx.Rngs(0)), file := io.StringIO())
    header, *rows, _, line = file.getvalue().splitlines()
    assert header.split() == ["weight", "matrices", "shape"]
    assert [" ".join(row.split()) for row in rows] == [
        "conv 1 12 x 5",
        "experts 2 4 x 6",
        "head 1 6 x 2",
        "heads 1 12 x 6",
        "qkv 1 6 x 12",
    ]
    assert line.startswith("0 of 6 matrices, 0.0% of the weights adapted; not adapted:")


class Sum(nnx.Module):
    """A weight that is no layer's, a table, a norm, and layers in a list."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.numpy.ones((6, 4)))
        self.table = nnx.Embed(9, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.tied = self.blocks[0]
        self.tree = nnx.Param({"scale": jax.numpy.ones((2, 3))})
        self.nothing, self.number = nnx.Param(None), nnx.Param(1.0)


@pytest.mark.parametrize("stacked", [True, False])
def test_coverage_counts_every_matrix_of_a_stack(stacked):
    """By hand: 6 in each block of width 8, a patch embedding and a head."""
    config = dataclasses.replace(TINY, stacked=stacked)
    plain = ViT(config, rngs=nnx.Rngs(0))
    targets = "blocks/.*/(query|key|value|out|fc1)"
    found = coverage(plain, targets)
    weights = 2 * (4 * 64 + 2 * 8 * 32)
    assert sum(w.weights for w in found.held) == weights + 16 * 8 + 8 * 3
    assert found.share == 0.606 < (weights - 2 * 256) / (weights + 152) < 0.607
    fc2 = "blocks/mlp/fc2" if stacked else "blocks/*/mlp/fc2"
    assert str(found) == (
        "10 of 14 matrices, 60.6% of the weights adapted; not adapted: "
        f"{fc2}, head, patch_embed"
    )
    adapted = snella.adapt(
        plain, snella.SnellaConfig(rank=4, targets=targets), rngs=nnx.Rngs(1)
    )
    assert coverage(adapted) == found


def test_coverage_names_the_largest_modules_without_adapters():
    base = ViT(dataclasses.replace(TINY, stacked=False), rngs=nnx.Rngs(0))
    found = coverage(base, "blocks/1/mlp/fc1")
    assert found.left == ("blocks/0", "blocks/1/attn", "blocks/1/mlp/fc2", *LEFT)
    assert coverage(base).left == ("blocks", *LEFT)


def test_coverage_of_weights_of_ones_own():
    """A layer that is reached twice counts once; all of them, and there is no rest."""
    base = Sum(nnx.Rngs(0))
    assert {w.path: w.count for w in coverage(base).held} == {
        "w": 1, "blocks/0": 1, "blocks/1": 1,
    }  # fmt: skip
    config = snella.SnellaConfig(rank=4, targets=r"w|blocks/\d", trainable="")
    layouts = {"w": snella.Layout((6,), (4,))}
    model = snella.adapt(base, config, rngs=nnx.Rngs(1), layouts=layouts)
    assert str(coverage(model)) == "3 of 3 matrices, 100.0% of the weights adapted"
    plain = 6 * 4 + 9 * 6 + 2 * 6 + 2 * (6 * 6 + 6) + 2 * 3 + 1
    assert snella.parameters(base) == (plain, plain)
    layer = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    assert coverage(layer).left == ("kernel",)
