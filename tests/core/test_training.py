"""The training step: two ways of use, budgets as data, nothing for frozen leaves."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import called
from flax import nnx

import snella_jax as snella
from snella_jax.models.vit import ViT, ViTConfig

SMALL = ViTConfig(
    width=16, depth=3, heads=2, patch_size=4, image_size=8, channels=1, num_classes=4
)
TARGETS = "blocks/.*/(key|value|fc2)"  # a step with all six compiles twice as long
CONFIG = snella.SnellaConfig(rank=4, target_density=0.3, targets=TARGETS)
EPOCHS, STEPS = 4, 3
IMAGES = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
LABELS = jnp.arange(6) % 4
TX = optax.chain(snella.track_importance(), optax.adamw(1e-2, mask=snella.decay_mask))


@functools.cache
def base():
    return ViT(SMALL, rngs=nnx.Rngs(0))


@functools.cache
def adapted():
    return snella.adapt(base(), CONFIG, rngs=nnx.Rngs(1))


def cross_entropy(model):
    logits = model(IMAGES)
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def apply(tx, grads, opt_state, params):
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


@functools.cache
def partitioned():
    """`partition` and a plain optimizer: losses, reports, model, step, arguments."""
    graphdef, trainable, budgets, frozen = snella.partition(adapted())
    schedule = CONFIG.schedule(snella.adapted_weights(adapted()), EPOCHS)
    opt_state = TX.init(trainable)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(trainable, opt_state, budgets, frozen):
        def loss_fn(trainable):
            return cross_entropy(nnx.merge(graphdef, trainable, budgets, frozen))

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        return *apply(TX, grads, opt_state, trainable), loss

    losses, reports = [], []
    for epoch in range(EPOCHS):
        if epoch:
            budgets, report = snella.reallocate(budgets, opt_state, schedule(epoch))
            reports.append(report)
        for _ in range(STEPS):
            trainable, opt_state, loss = step(trainable, opt_state, budgets, frozen)
            losses.append(float(loss))
    model = nnx.merge(graphdef, trainable, budgets, frozen)
    arguments = (trainable, opt_state, budgets, frozen)
    return losses, reports, model, step, arguments


@functools.cache
def one_tree():
    """One tree of parameters and `optax.partition(labels)`: the same training."""
    graphdef, budgets, params = nnx.split(adapted(), snella.Budget, ...)
    labels = snella.labels(params, CONFIG.trainable)
    schedule = CONFIG.schedule(snella.adapted_weights(adapted()), EPOCHS)
    tx = optax.partition(
        {
            "adapter": TX,
            "trainable": optax.adamw(1e-2, mask=snella.decay_mask),
            "frozen": optax.set_to_zero(),
        },
        labels,
    )
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, budgets):
        def loss_fn(params):
            params = snella.stop_gradients(params, labels)
            return cross_entropy(nnx.merge(graphdef, budgets, params))

        loss, grads = jax.value_and_grad(loss_fn)(params)
        return *apply(tx, grads, opt_state, params), loss

    losses = []
    for epoch in range(EPOCHS):
        if epoch:
            budgets, _ = snella.reallocate(budgets, opt_state, schedule(epoch))
        for _ in range(STEPS):
            params, opt_state, loss = step(params, opt_state, budgets)
            losses.append(float(loss))
    model = nnx.merge(graphdef, budgets, params)
    return losses, model, step, (params, opt_state, budgets)


def test_both_ways_of_use_give_the_same_numbers():
    losses, _, model, _, _ = partitioned()
    other_losses, other, _, _ = one_tree()
    assert losses[-1] < 0.7 * losses[0]
    np.testing.assert_allclose(losses, other_losses, rtol=1e-6)
    chex.assert_trees_all_close(
        nnx.to_pure_dict(nnx.state(model)),
        nnx.to_pure_dict(nnx.state(other)),
        rtol=1e-5,
    )


def test_budgets_follow_the_schedule_and_the_step_does_not_retrace():
    """(`partitioned` would have raised at a second trace.)"""
    _, reports, model, _, _ = partitioned()
    weights = snella.adapted_weights(model)
    assert weights == 3 * (2 * 16 * 16 + 16 * 64)
    schedule = CONFIG.schedule(weights, EPOCHS)
    assert [r.budgets.sum() for r in reports] == [schedule(e) for e in (1, 2, 3)]
    assert [r.steps_since for r in reports] == [STEPS] * 3
    assert len(reports[0].names) == 9 and "blocks/attn/key[2]" in reports[0].names
    assert np.ptp(reports[-1].budgets / reports[-1].capacities) > 0.1  # they compete


def test_the_merged_model_moved_exactly_the_budget_and_is_plain():
    _, reports, model, _, _ = partitioned()
    plain, merged = base(), snella.merge(model)
    assert nnx.graphdef(merged) == nnx.graphdef(plain)
    old = dict(nnx.to_flat_state(nnx.state(plain)))
    changed = 0
    for name, value in nnx.to_flat_state(nnx.state(merged)):
        moved = np.count_nonzero(np.asarray(value[...]) != np.asarray(old[name][...]))
        if name[0] == "blocks" and name[-1] == "kernel":
            changed += moved
        elif name[0] in ("head", "cls_token"):
            assert moved > 0
        else:
            assert moved == 0, f"{name} is frozen and moved"
    budget = reports[-1].budgets.sum()  # a tiny update may round to nothing
    assert 0.999 * budget < changed <= budget
    outputs = called(merged, IMAGES), called(model, IMAGES)
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)


def test_new_budgets_do_not_compile_again():
    """`assert_max_traces` sees tracing alone; the cache sees every compilation."""
    _, _, _, step, _ = partitioned()
    assert step._cache_size() <= 1  # 0 once a long session evicted it


def test_forgetting_to_reallocate_is_seen():
    graphdef, trainable, budgets, frozen = snella.partition(adapted())
    _, _, _, step, _ = partitioned()
    opt_state = TX.init(trainable)
    with pytest.raises(ValueError, match="before any step"):
        snella.reallocate(budgets, opt_state, 100)
    for _ in range(2):
        trainable, opt_state, _ = step(trainable, opt_state, budgets, frozen)
    assert snella.steps_since_reallocation(budgets, opt_state) == 2
    # New budgets that were not put back are the same mistake.
    model = nnx.merge(graphdef, trainable, budgets, frozen)
    new, _ = snella.reallocate(budgets, opt_state, 100)
    with pytest.raises(
        snella.BudgetsNeverMoved, match=r"nnx\.update\(model, budgets\)"
    ):
        snella.merge(model)
    nnx.update(model, new)
    assert sum(matrix.budget for matrix in snella.sparsity(model)) == 100
    snella.merge(model)


def moments(opt_state):
    return sum(leaf.size for leaf in jax.tree.leaves(opt_state))


def test_no_moments_are_held_for_frozen_leaves():
    """Two for AdamW and two for the importance of `a` and `b`, and a few counters."""
    _, _, _, _, (trainable, opt_state, _, frozen) = partitioned()
    _, _, _, (params, whole_state, _) = one_tree()
    sizes = {
        path: value[...].size
        for path, value in nnx.to_flat_state(trainable)
    }  # fmt: skip
    factors = sum(size for path, size in sizes.items() if path[-1] in ("a", "b"))
    held = 2 * sum(sizes.values()) + 2 * factors
    assert held <= moments(opt_state) <= held + 4
    assert held <= moments(whole_state) <= held + 8
    frozen_size = sum(v.size for v in jax.tree.leaves(frozen))
    assert frozen_size > 1000
    assert sum(v.size for v in jax.tree.leaves(params)) == frozen_size + sum(
        sizes.values()
    )


def traced(function, *arguments, of="dot_general"):
    """How often an operation stands in the traced program."""
    return str(jax.make_jaxpr(function)(*arguments)).count(f"{of}[")


def test_no_gradient_is_computed_for_frozen_leaves():
    """Both ways trace the same matmuls, and no gradient of the patch embedding."""
    _, _, _, step, arguments = partitioned()
    _, _, whole_step, whole_arguments = one_tree()
    step, whole_step = step.__wrapped__.__wrapped__, whole_step.__wrapped__
    assert traced(step, *arguments) == traced(whole_step, *whole_arguments)
    graphdef, params = nnx.split(base())
    full = jax.grad(lambda p: cross_entropy(nnx.merge(graphdef, p)))
    convolution = {"of": "conv_general_dilated"}
    assert traced(step, *arguments, **convolution) == 1
    assert traced(whole_step, *whole_arguments, **convolution) == 1
    assert traced(full, params, **convolution) > 1
