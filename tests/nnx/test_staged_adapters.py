"""Adapters on Swin and ConvNeXt: which matrices, and what is done with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from staged import BOTH, PIXELS, close, logits, small

import snella_jax as snella
from snella_jax import models
from snella_jax.nnx.layers import AdaptedLayer

WIDTHS = (128, 256, 512, 1024)
COUNTS = {  # of each stage: matrices (blocks x what each has) by shape over the width
    "swin_b": ({(1, 1): 4, (1, 4): 1, (4, 1): 1}, (2, 2, 18, 2)),
    "convnext_b": ({(1, 4): 1, (4, 1): 1}, (3, 3, 27, 3)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_default_targets_are_the_papers_matrices(name):
    """Counted by hand: q, k, v, proj, fc1 and fc2 of Swin, fc1 and fc2 of ConvNeXt."""
    adapted = nnx.eval_shape(
        lambda: snella.adapt(
            models.create(name, num_classes=10, rngs=nnx.Rngs(0)),
            snella.SnellaConfig(rank=8, trainable="head"),
            rngs=nnx.Rngs(1),
        )
    )
    found: dict[tuple[int, int], int] = {}
    for _, node in nnx.iter_graph(adapted):
        if isinstance(node, AdaptedLayer):
            layout = node.adapter.site.layout
            count = int(np.prod(node.adapter.site.lead))
            found[layout.n, layout.m] = found.get((layout.n, layout.m), 0) + count
    kinds, depths = COUNTS[name]
    expected = {(n * width, m * width): 0 for width in WIDTHS for n, m in kinds}
    for width, depth in zip(WIDTHS, depths, strict=True):
        for (n, m), count in kinds.items():
            expected[n * width, m * width] += depth * count
    assert found == expected
    assert snella.adapted_weights(adapted) == 83_755_008  # of both, as it happens
    trained = nnx.state(adapted, nnx.Param)
    factors = sum(8 * (n + m) + 4 for (n, m), k in expected.items() for _ in range(k))
    size = sum(leaf.size for leaf in jax.tree.leaves(trained))
    assert size == factors + 1024 * 10 + 10


def adapted(name, changes=None, **options):
    model = small(name, **(changes or {}))
    config = snella.SnellaConfig(rank=4, trainable="head", **options)
    return model, snella.adapt(model, config, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("name", BOTH)
def test_adapted_merged_saved_and_unstacked(name, tmp_path):
    base, model = adapted(name)
    for factors in (nnx.state(model, snella.Factor), nnx.state(model.head)):
        for leaf in jax.tree.leaves(
            factors, is_leaf=lambda n: isinstance(n, nnx.Param)
        ):
            noise = np.random.default_rng(leaf.size).normal(size=leaf.shape)
            leaf.set_value(jnp.asarray(np.asarray(leaf[...]) + np.float32(0.3 * noise)))
    moved = logits(model)
    assert not np.allclose(moved, logits(base), atol=1e-2)
    close(logits(snella.merge(model, unmoved_budgets=True)), moved)
    close(logits(models.unstack(snella.merge(model, unmoved_budgets=True))), moved)
    with pytest.raises(ValueError, match="has adapters: expected one without"):
        models.unstack(model)
    snella.save(model, tmp_path / "adapter")
    loaded = snella.load(small(name), tmp_path / "adapter")
    np.testing.assert_array_equal(logits(loaded), moved)
    # Of stacked blocks, rows become blocks of a list.
    names = {r"blocks/(\d+)/(.*)\[(\d+)\]": r"blocks/\1/\3/\2"}
    listed = models.unstack(small(name))
    close(logits(snella.load(listed, tmp_path / "adapter", rename=names)), moved)


ONE_STAGE = {
    "swin": {"depths": (2,), "heads": (2,)},
    "convnext": {"widths": (8,), "depths": (2,)},
}


@pytest.mark.parametrize("name", BOTH)
def test_factors_learn_and_budgets_compete(name):
    _, model = adapted(name, ONE_STAGE[name], target_density=0.5)
    graphdef, trainable, budgets, frozen = snella.partition(model)
    tx = optax.chain(snella.track_importance(), optax.adam(1e-2))
    opt_state, labels = tx.init(trainable), jnp.array([0, 2])

    @jax.jit
    def step(trainable, opt_state):
        def loss(trainable):
            model = nnx.merge(graphdef, trainable, budgets, frozen)
            return optax.softmax_cross_entropy_with_integer_labels(
                model(PIXELS), labels
            ).mean()

        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, opt_state_ = tx.update(gradient, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state_, value

    losses = []
    for _ in range(40):
        trainable, opt_state, value = step(trainable, opt_state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 2
    total = snella.adapted_weights(model) // 2
    _, report = snella.reallocate(budgets, opt_state, total)
    assert report.budgets.sum() == total
    density = report.budgets / report.capacities
    assert density.min() < 0.5 < density.max()
