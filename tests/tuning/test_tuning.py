"""`Tuning`: the same numbers as today's calls, and no way to leave one of them out."""

import dataclasses
import functools

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from documented import trained as trained_in_a_loop
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import snella_jax as snella

X = jax.random.normal(jax.random.key(0), (8, 6))
Y = jnp.sin(X[:, :2])
CONFIG = snella.SnellaConfig(
    rank=4, target_density=0.3, targets=r"fc\d", trainable="head"
)
TX = optax.adamw(1e-2, mask=snella.decay_mask)
EPOCHS, STEPS = 3, 2
LENGTH = {"epochs": EPOCHS, "steps_per_epoch": STEPS}


class Net(nnx.Module):
    def __init__(self, rngs, rate=0.0, dtype=jnp.float32):
        new = functools.partial(nnx.Linear, rngs=rngs, param_dtype=dtype)
        self.fc1, self.fc2, self.head = new(6, 8), new(8, 8), new(8, 2)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs) if rate else None

    def __call__(self, x):
        x = self.drop(nnx.relu(self.fc1(x)))
        x = x if self.norm is None else self.norm(x)
        return self.head(nnx.relu(self.fc2(x)))


def loss_fn(model, batch):
    x, y = batch
    return jnp.square(model(x) - y).mean()


def created(config=CONFIG, tx=TX, net=None, **changes):
    net = Net(nnx.Rngs(0)) if net is None else net
    return snella.Tuning.create(net, config, tx, rngs=nnx.Rngs(1), **(LENGTH | changes))


@functools.cache
def start():
    return created()


def trained(state, steps=EPOCHS * STEPS, batch=(X, Y)):
    for count in range(1, steps + 1):
        state, _ = state.step(loss_fn, batch)
        if not count % STEPS:
            state = state.end_of_epoch()
    return state


@functools.cache
def whole():
    return trained(start())


def assert_equal(one, other):
    chex.assert_trees_all_equal(jax.tree.leaves(one), jax.tree.leaves(other))


def test_an_end_of_an_epoch_cannot_be_left_out():
    """One step early, on time, twice, late; and what merging says of it."""
    state, _ = start().step(loss_fn, (X, Y))
    with pytest.raises(ValueError, match="after 1 steps of epoch 1 of 3: expected"):
        state.end_of_epoch()
    with pytest.raises(snella.BudgetsNeverMoved, match="No epoch has ended: 1 of"):
        state.merge()
    on_time, _ = state.step(loss_fn, (X, Y))
    with pytest.raises(snella.BudgetsNeverMoved, match="after 0 of 1 epochs"):
        on_time.merge()
    ended = on_time.end_of_epoch()
    assert ended.merge().fc1.kernel.shape == (6, 8)
    with pytest.raises(ValueError, match="for epoch 1 of 3 already"):
        ended.end_of_epoch()
    late, _ = on_time.step(loss_fn, (X, Y))
    with pytest.raises(ValueError, match="after 3 steps of epoch 1 of 3: expected"):
        late.end_of_epoch()
    with pytest.raises(snella.BudgetsNeverMoved, match=r"state\.end_of_epoch\(\)"):
        late.merge()
    as_it_is = late.merge(unmoved_budgets=True)
    np.testing.assert_allclose(as_it_is(X), late.model(X), atol=1e-6)


def test_the_end_of_the_last_epoch_changes_nothing():
    state = trained(start(), EPOCHS * STEPS - 1)
    state, _ = state.step(loss_fn, (X, Y))
    assert state.end_of_epoch() is state and whole().end_of_epoch() is whole()
    assert_equal(state, whole())
    np.testing.assert_allclose(state.merge()(X), state.model(X), atol=1e-6)
    assert state.density == pytest.approx(0.3, abs=0.01)
    half, expected = (
        state.merge(dtype=jnp.bfloat16),
        snella.merge(state.model, dtype=jnp.bfloat16),
    )
    assert_equal(nnx.state(half), nnx.state(expected))
    assert half.head.bias.dtype == jnp.bfloat16


def test_budgets_are_those_of_the_schedule():
    totals = start().plan.totals
    assert totals == tuple(CONFIG.schedule(112, EPOCHS)(t) for t in range(EPOCHS))
    warm = created(schedule={"warmup": 1})
    assert warm.plan.totals[:2] == (112, 112) and warm.plan.totals[-1] == totals[-1]
    budgets = [w.budget for w in whole().weights()]
    assert sum(map(int, budgets)) == totals[-1]
    found, scores = whole().metrics(), snella.importance(whole().opt_state)
    assert found.keys() == {
        "density",
        *(f"density/fc{i}" for i in (1, 2)),
        *(f"importance/fc{i}" for i in (1, 2)),
    }
    assert found["density/fc2"] == int(budgets[1]) / 64
    assert found["importance/fc2"] == float(scores["fc2/adapter"]) > 0


def test_a_state_is_jitted_donated_and_scanned_as_it_is():
    """An epoch in one call; traced once for all of them. The model stays."""
    net, traces = Net(nnx.Rngs(0)), 0
    before = jax.tree.map(jnp.copy, nnx.state(net))

    def counted(model, batch):
        nonlocal traces
        traces += 1
        return loss_fn(model, batch)

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(state, batches):
        return jax.lax.scan(lambda s, b: s.step(counted, b), state, batches)

    state, batches = (
        created(net=net),
        jax.tree.map(lambda x: jnp.stack([x] * STEPS), (X, Y)),
    )
    copy = jax.tree.map(jnp.copy, state)
    for _ in range(EPOCHS):
        old = copy
        copy, losses = epoch(copy, batches)
        copy = copy.end_of_epoch()
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.trainable))
    assert losses.shape == (STEPS,)
    chex.assert_trees_all_close(*map(_numbers, (copy, whole())), rtol=1e-4, atol=1e-6)
    one = traces
    epoch(copy, batches)
    assert traces == one
    assert_equal(before, nnx.state(net))
    with pytest.raises(TypeError, match=r"end_of_epoch runs on the host"):
        jax.jit(lambda state: state.end_of_epoch())(state)


def _numbers(state):
    return [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.number)]


def test_orbax_goes_on_bit_for_bit(tmp_path):
    net = Net(nnx.Rngs(0), rate=0.5)
    state = trained(created(net=net), 3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        other = created(net=net)
        found = checkpointer.restore(tmp_path / "state", other)
    assert_equal(found, state)
    ends = [one.step(loss_fn, (X, Y))[0].end_of_epoch() for one in (state, found)]
    assert_equal(*ends)
    assert_equal(*(nnx.state(one.merge()) for one in ends))


@pytest.mark.parametrize("types", [(jax.sharding.AxisType.Auto,) * 2, None])
def test_a_state_is_sharded_as_it_is(types):
    """Batches over `data`, weights over `model`: compiled once, close numbers.

    With the axes that `make_mesh` gives by itself, too: explicit ones in this jax.
    """
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=types)
    net, traces = Net(nnx.Rngs(0)), 0
    for layer in (net.fc1, net.fc2, net.head):
        by = PartitionSpec(None, "model")
        kernel, bias = layer.kernel[...], layer.bias[...]
        layer.kernel.set_value(jax.device_put(kernel, NamedSharding(mesh, by)))
        by = PartitionSpec("model")
        layer.bias.set_value(jax.device_put(bias, NamedSharding(mesh, by)))

    def counted(model, batch):
        nonlocal traces
        traces += 1
        return loss_fn(model, batch)

    state = created(net=net)
    batch = jax.device_put((X, Y), NamedSharding(mesh, PartitionSpec("data")))
    for _ in range(EPOCHS):
        for _ in range(STEPS):
            state, _ = state.step(counted, batch)
        state = state.end_of_epoch()
    assert traces == 1
    kernel, b = state.merge().fc1.kernel, state.trainable["fc1"]["adapter"]["b"]
    assert kernel[...].sharding.spec[1] == "model"
    assert types is None or b.sharding.spec[1] == "model"  # explicit: whole factors
    pairs = map(_numbers, (state, whole()))
    chex.assert_trees_all_close(*pairs, rtol=1e-3, atol=1e-5)


def test_a_state_is_donated_whose_optimizer_keeps_the_parameters():
    """Prodigy's state holds the parameters' first values: the very arrays."""
    state = created(tx=optax.contrib.prodigy(1e-2))
    step = functools.partial(snella.Tuning.step, loss_fn=loss_fn, batch=(X, Y))
    _, expected = step(state)
    _, loss = jax.jit(step, donate_argnums=0)(state)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_random_streams_and_statistics_are_carried():
    """Bit for bit as by the loop of docs/quickstart.md, which carries them itself."""
    x, net = jnp.tile(X, (8, 1)), Net(nnx.Rngs(0), rate=0.5)
    y = jnp.arange(64) % 2
    model = snella.adapt(net, CONFIG, rngs=nnx.Rngs(1))
    expected = trained_in_a_loop(model, CONFIG, x, y, EPOCHS)

    def cross_entropy(model, batch):
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    state = created(net=net)
    for _ in range(EPOCHS):
        for i in (0, 32):
            state, _ = state.step(cross_entropy, (x[i : i + 32], y[i : i + 32]))
        state = state.end_of_epoch()
    assert_equal(nnx.state(state.model), nnx.state(expected["adapted"]))
    assert int(state.changing["drop"]["rngs"]["count"][...]) == 2 * EPOCHS


def test_layers_in_evaluation_mode_are_named(caplog):
    """They stay so in training, as the user may want it."""
    net = Net(nnx.Rngs(0), rate=0.5)
    net.eval()
    state = created(net=net)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("drop, norm: in evaluation mode")
    assert "call model.train() before Tuning.create" in message
    assert state.model.drop.deterministic and state.model.norm.use_running_average
    caplog.clear()
    net.train()
    created(net=net)
    assert not caplog.records


def test_no_array_of_the_base_is_a_constant_of_the_step():
    """They are arguments: as constants they would be copied into every program."""
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (X, Y))
    traced = jax.make_jaxpr(lambda state, batch: state.step(loss_fn, batch))
    sizes = list(_constants(traced(start(), batch)))
    assert max(sizes, default=0) < 16  # the smallest kernel of the base has 16 numbers
    closed = jax.make_jaxpr(
        lambda x: jax.jit(lambda x: x @ start().model.fc1.kernel)(x)
    )
    assert 48 in _constants(closed(X))  # so it would be seen


def _constants(closed):
    """Yields the sizes of all constants of a program, of those inside it, too."""
    yield from (np.size(const) for const in closed.consts)
    for eqn in closed.jaxpr.eqns:
        for inner in jax.tree.leaves(eqn.params, is_leaf=_is_program):
            if isinstance(inner, jax.extend.core.ClosedJaxpr):
                yield from _constants(inner)
            elif isinstance(inner, jax.extend.core.Jaxpr):
                yield from _constants(jax.extend.core.ClosedJaxpr(inner, ()))


def _is_program(value):
    return isinstance(value, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr)


def test_a_state_is_made_of_shapes_alone():
    """For a program that is only compiled: the shapes of the state with arrays."""
    shapes = jax.eval_shape(created)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        *map(jax.tree.leaves, (shapes, start()))
    )
    after, loss = jax.eval_shape(lambda s: s.step(loss_fn, (X, Y)), shapes)
    assert loss.shape == () and jax.tree.structure(after) == jax.tree.structure(shapes)


def test_adapters_that_drop_get_a_new_key_every_step():
    config = snella.SnellaConfig(
        rank=4,
        targets=r"fc\d",
        trainable="head",
        path="parallel",
        drop_path=0.5,
        gate="hard",
    )
    state = created(config, optax.sgd(0.0))
    losses = set()
    for _ in range(4):
        state, loss = state.step(loss_fn, (X, Y))
        losses.add(float(loss))
    assert len(losses) > 1


def test_parts_of_a_batch_accumulate_to_its_mean():
    """Importance is that of the mean gradient, as of the whole batch."""
    (one, loss), (parts, mean) = (
        start().step(loss_fn, (X, Y), accumulate=n) for n in (1, 4)
    )
    assert float(mean) == pytest.approx(float(loss), rel=1e-5)
    chex.assert_trees_all_close(*map(_numbers, (parts, one)), rtol=1e-3, atol=1e-6)
    for wrong, error, message in (
        (3, ValueError, "does not divide"),
        (0, ValueError, "expected at least 1"),
        (2.0, TypeError, r"accumulate=2\.0: expected an integer"),
    ):
        with pytest.raises(error, match=message):
            start().step(loss_fn, (X, Y), accumulate=wrong)


def test_optax_accumulates_over_steps():
    """Around a tracker, which then sees mean gradients; else one stands in front."""
    inner = optax.chain(snella.track_importance(), optax.sgd(0.1))
    state = created(tx=optax.MultiSteps(inner, 2))
    halves = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    for half in halves:
        state, _ = state.step(loss_fn, half)
    expected, _ = created(tx=optax.sgd(0.1)).step(loss_fn, (X, Y))
    chex.assert_trees_all_close(
        state.trainable, expected.trainable, rtol=1e-4, atol=1e-6
    )
    scores = (snella.importance(each.opt_state) for each in (state, expected))
    chex.assert_trees_all_close(*scores, rtol=1e-3)
    assert state.end_of_epoch().density < 1
    outside, _ = created(tx=optax.MultiSteps(optax.sgd(0.1), 2)).step(loss_fn, (X, Y))
    assert_equal(outside.trainable, start().trainable)
    assert float(snella.importance(outside.opt_state)["fc1/adapter"]) == 0
    assert int(outside.opt_state[0].step) == 1


def test_fixed_budgets_need_no_importance():
    config = snella.SnellaConfig(
        rank=4, target_density=0.3, targets="fc1", trainable="", allocation="fixed"
    )
    state = trained(created(config))
    assert state.metrics() == {"density": 14 / 48, "density/fc1": 14 / 48}
    with pytest.raises(ValueError, match="0 importance states"):
        snella.importance(state.opt_state)
    with pytest.raises(ValueError, match="expected none, since budgets stay"):
        created(config, schedule={"warmup": 1})


def test_bfloat16():
    """A base in bfloat16: factors and their optimizer stay in float32."""
    config = dataclasses.replace(CONFIG, trainable="")
    state = trained(created(config, net=Net(nnx.Rngs(0), dtype=jnp.bfloat16)))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state.trainable)}
    assert dtypes == {jnp.dtype("float32")}
    assert state.model.fc1.kernel.dtype == jnp.bfloat16
    _, loss = start().step(loss_fn, (X, Y))
    _, trained_loss = state.step(loss_fn, (X, Y))
    assert float(trained_loss) < float(loss)


def test_an_adapter_is_saved(tmp_path):
    state, net = whole(), Net(nnx.Rngs(0))
    state.save(tmp_path / "adapter", base="a net")
    loaded = snella.load(net, tmp_path / "adapter")
    np.testing.assert_array_equal(loaded(X), state.model(X))
    assert [w.path for w in state.weights()] == ["fc1", "fc2"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epochs": 1}, ValueError, "epochs=1: budgets move after each epoch but"),
        (
            {"epochs": 1, "config": dataclasses.replace(CONFIG, initial_density=0.3)},
            ValueError,
            "epochs=1: budgets move after each epoch but the last",
        ),
        ({"epochs": 0}, ValueError, "epochs=0, steps_per_epoch=2: expected at least"),
        ({"steps_per_epoch": 2.5}, TypeError, "integer"),
        ({"tx": 1e-3}, TypeError, "tx is a float: expected an optax transformation"),
    ],
)
def test_wrong_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        created(**changes)
