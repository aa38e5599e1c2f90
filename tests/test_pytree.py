"""Adapters in plain dicts of parameters, for any function that takes them."""

import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import snella_jax as snella
from snella_jax import pytree
from snella_jax.core.fused import fall_back

X = jax.random.normal(jax.random.key(0), (32, 6))
Y = jnp.argmax(X[:, :3] * X[:, 3:], -1)


def parameters():
    keys = jax.random.split(jax.random.key(1), 4)
    return {
        "layers": {
            "w": jax.random.normal(keys[0], (3, 6, 6)) / 3,
            "fc": {"kernel": jax.random.normal(keys[1], (6, 8)) / 3},
        },
        "out": jax.random.normal(keys[2], (8, 3)),
        "scale": jnp.ones(6),
    }


def forward(params, x):
    for w in params["layers"]["w"]:
        x = x + jnp.tanh(x @ w)
    return (x * params["scale"]) @ params["layers"]["fc"]["kernel"] @ params["out"]


LAYOUTS = {"layers/w": snella.Layout((6,), (6,))}


def adapted(**changes):
    config = snella.SnellaConfig(
        **({"rank": 4, "targets": "layers/.*", "trainable": "out"} | changes)
    )
    return pytree.adapt(parameters(), config, key=jax.random.key(2), layouts=LAYOUTS)


def test_it_trains_reallocates_merges_and_is_read_again(tmp_path):
    adapters, params = adapted()
    trainable, budgets, frozen = adapters.partition(params)
    assert set(trainable) == {"layers", "out"} and set(frozen) == {"layers", "scale"}
    assert set(trainable["layers"]) == {"w_adapter", "fc"}
    tx = optax.chain(
        snella.track_importance(), optax.adamw(3e-2, mask=snella.decay_mask)
    )
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state, budgets):
        def loss(trainable):
            plain = adapters.summed(pytree.join(trainable, budgets, frozen))
            logits = forward(plain, X)
            return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    losses = []
    for index in range(30):
        if index == 15:
            budgets, report = snella.reallocate(budgets, state, 60)
            assert set(report.names) == {
                "layers/fc", *(f"layers/w[{i}]" for i in range(3)),
            }  # fmt: skip
        trainable, state, value = step(trainable, state, budgets)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    params = pytree.join(trainable, budgets, frozen)
    moved = [m.moved for m in snella.sparsity(adapters.weights(params))]
    assert sum(moved) == 60
    merged = adapters.merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(parameters())
    summed = forward(adapters.summed(params), X)
    np.testing.assert_array_equal(forward(merged, X), summed)
    adapters.save(params, tmp_path / "a")
    again, loaded = pytree.load(parameters(), tmp_path / "a", layouts=LAYOUTS)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    np.testing.assert_array_equal(forward(again.summed(loaded), X), summed)
    table = io.StringIO()
    snella.describe(again.weights(loaded), table)
    assert "layers/w[2]" in table.getvalue() and "60" in table.getvalue()


def test_fixed_coefficients_do_not_train():
    adapters, params = adapted(kernel=snella.kernels.mix_k(learn_piece_coeff=False))
    trainable, _, frozen = adapters.partition(params)
    assert "piece_coeff" not in trainable["layers"]["fc"]["adapter"]
    assert set(frozen["layers"]["fc"]["adapter"]) == {"piece_coeff"}


def test_what_does_not_fit_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"matches no layer(.|\n)*layers/fc\n  out"):
        adapted(targets="nothing")
    with pytest.raises(ValueError, match="needs a layer"):
        adapted(path="parallel")
    with pytest.raises(ValueError, match="'no' matches none of the targets"):
        adapted(overrides={"no": {"rank": 2}})
    config = snella.SnellaConfig(rank=4, targets="layers/w", trainable="")
    wide = {"layers/w": snella.Layout((5,), (6,))}
    with pytest.raises(ValueError, match=r"expected \(5, 6\) behind the axes"):
        pytree.adapt(parameters(), config, key=jax.random.key(0), layouts=wide)
    odd = {"layers/v": snella.Layout((5,), (6,))}
    with pytest.raises(ValueError, match=r"'layers/v' matches no array(.|\n)*layers/w"):
        pytree.adapt(parameters(), config, key=jax.random.key(0), layouts=odd)
    adapters, params = adapted()
    adapters.save(params, tmp_path / "a")
    with pytest.raises(snella.CheckpointError, match="layers/w: there is no such"):
        pytree.load(parameters(), tmp_path / "a")


def test_keys_stay_as_they_are():
    """Haiku's have slashes; empty dicts are part of the tree."""
    params = {
        "mlp/~/linear": {"w": jnp.ones((6, 4)), "b": jnp.ones(4)},
        "state": {},
        "out": jnp.ones((4, 2)),
    }
    config = snella.SnellaConfig(
        rank=4, targets=".*/linear/w", trainable="out", frozen_dtype=jnp.bfloat16
    )
    adapters, adapted = pytree.adapt(params, config, key=jax.random.key(0))
    assert set(adapted["mlp/~/linear"]) == {"w", "b", "w_adapter"}
    parts = adapters.partition(adapted)
    assert jax.tree.structure(pytree.join(*parts)) == jax.tree.structure(adapted)
    merged = adapters.merge(adapted, unmoved_budgets=True)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert merged["mlp/~/linear"]["b"].dtype == jnp.bfloat16


def test_nothing_of_the_user_s_is_taken_for_an_adapter():
    config = snella.SnellaConfig(rank=4, targets="fc", trainable="")
    params = {"fc": {"kernel": jnp.ones((6, 4)), "adapter": {"down": jnp.ones(3)}}}
    with pytest.raises(ValueError, match="There is something at fc/adapter"):
        pytree.adapt(params, config, key=jax.random.key(0))
    _, once = adapted()
    with pytest.raises(ValueError, match="have adapters already"):
        own = snella.SnellaConfig(rank=4, targets="layers/fc", trainable="")
        pytree.adapt(once, own, key=jax.random.key(0))
    with pytest.raises(TypeError, match="layers is a list: expected nested dicts"):
        pytree.adapt({"layers": [params]}, config, key=jax.random.key(0))
    twice = {"a": {"b": jnp.ones((2, 2))}, "a/b": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="Two parameters have one name"):
        pytree.adapt(twice, config, key=jax.random.key(0))
    with pytest.raises(ValueError, match="matches adapted weights"):
        adapted(trainable="layers/w")


def test_statistics_of_another_binding_do_not_train(tmp_path):
    adapters, params = adapted()
    adapters.save(params, tmp_path / "a", batch_stats={"scale": jnp.full(6, 2.0)})
    again, loaded = pytree.load(parameters(), tmp_path / "a", layouts=LAYOUTS)
    np.testing.assert_array_equal(loaded["scale"], 2)
    trainable, _, frozen = again.partition(loaded)
    assert "scale" in frozen and set(trainable) == {"layers", "out"}


def test_parameters_may_have_any_byte_order(tmp_path):
    """JAX takes none but the machine's; files of other machines have theirs."""
    own = jax.tree.map(np.asarray, parameters())
    big = jax.tree.map(lambda x: np.asfortranarray(x).astype(">f4"), own)
    config = snella.SnellaConfig(rank=4, targets="layers/fc", trainable="out")
    both = []
    for params in (own, big):
        adapters, adapted = pytree.adapt(params, config, key=jax.random.key(0))
        both.append(forward(adapters.summed(adapted), X))
        adapters.save(adapted, tmp_path / str(len(both)))
    np.testing.assert_array_equal(*both)
    for params in (own, big):
        for folder in "12":
            adapters, loaded = pytree.load(params, tmp_path / folder)
            found = forward(adapters.summed(loaded), X)
            np.testing.assert_array_equal(found, both[0])


def test_matched_weights_without_a_layout_are_named():
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
        "fc": {"kernel": jnp.ones((4, 4))},
        "norms": {"scale": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 3, 4))},
        "pos_embedding": jnp.ones((1, 5, 4)),
        "cls_token": jnp.ones((1, 2, 4)),
        "gate": jnp.ones((1, 1, 4)),
        "counts": jnp.ones((2, 3, 4), int),
        "experts": jnp.ones((2, 3, 4)),
    }

    def adapt(targets, **changes):
        config = snella.SnellaConfig(
            **({"rank": 4, "targets": targets, "trainable": ""} | changes)
        )
        key = jax.random.key(0)
        return pytree.adapt(params, config, key=key, layouts=changes.pop("layouts", {}))

    with pytest.raises(
        ValueError, match=r"axes are: \n  conv/kernel.*\n  experts"
    ) as e:
        adapt(".*")
    named = [line.split()[0] for line in str(e.value).splitlines()[1:-1]]
    assert named == ["conv/kernel", "experts"]
    adapters, _ = adapt(".*", trainable="conv|experts")  # those train themselves
    assert set(adapters.sites) == {("fc", "kernel")}
    assert set(adapt("fc|norms.*|.*bias")[0].sites) == {("fc", "kernel")}


def test_a_model_of_another_binding_is_told_its_own():
    config = snella.SnellaConfig(rank=4, targets="fc", trainable="")
    models = [
        (nn.Dense(3), "call snella_jax.linen.adapt"),
        (nnx.Linear(3, 3, rngs=nnx.Rngs(0)), "call snella_jax.adapt"),
        (object(), "make its arrays a dict"),
    ]
    for model, message in models:
        with pytest.raises(TypeError, match=message):
            pytree.adapt(model, config, key=jax.random.key(0))


def test_names_of_boxed_parameters_are_kept():
    spec = jax.sharding.PartitionSpec
    box = nn.Partitioned(jnp.ones((4, 6)), ("data", ("fsdp", "tensor")))
    params = {"fc": {"kernel": box, "bias": jnp.ones(6)}}
    config = snella.SnellaConfig(rank=4, targets="fc", trainable="")
    adapters, adapted = pytree.adapt(params, config, key=jax.random.key(0))
    assert isinstance(adapted["fc"]["kernel"], jax.Array)
    specs = adapters.specs(adapted)["fc"]
    assert specs["kernel"] == spec("data", ("fsdp", "tensor"))
    assert specs["adapter"]["a"] == spec(None, "data", None)
    assert specs["adapter"]["b"] == spec(None, ("fsdp", "tensor"), None)
    assert specs["bias"] == specs["adapter"]["alpha"] == spec()


def test_a_weight_stacked_behind_its_inputs_is_a_layout_with_slices(tmp_path):
    """`nn.scan(variable_axes={"params": 1})` stacks it so."""
    weights = jax.random.normal(jax.random.key(3), (3, 6, 4))
    params = {"w": weights.swapaxes(0, 1)}
    layouts = {"w": snella.Layout((6,), (4,), (3,), order=(1, 0, 2))}
    config = snella.SnellaConfig(
        rank=4, targets="w", trainable="", allocation="fixed", target_density=0.3
    )
    adapters, adapted = pytree.adapt(
        params, config, key=jax.random.key(0), layouts=layouts
    )
    (weight,) = adapters.weights(adapted)
    np.testing.assert_array_equal(weight.matrices(), weights)
    moved = np.asarray(adapters.merge(adapted)["w"]).swapaxes(0, 1) != weights
    assert moved.sum((1, 2)).tolist() == [8, 7, 7]  # 0.3 of 72
    adapters.save(adapted, tmp_path / "a")
    _, loaded = pytree.load(params, tmp_path / "a", layouts=layouts)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapted)


class Attention(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array


def test_arrays_of_named_tuples_keep_their_names():
    weights = (jnp.full((2, 2), i) for i in range(3))
    params, restored = pytree.flattened({"attn": Attention(*weights)})
    assert {n: int(v[0, 0]) for n, v in params["attn"].items()} == {
        "query": 0, "key": 1, "value": 2
    }  # fmt: skip
    assert [int(v[0, 0]) for v in restored(params)["attn"]] == [0, 1, 2]


def test_a_layout_is_given_by_the_path_of_an_array_or_of_its_layer():
    params = {"fc": {"kernel": jnp.zeros((6, 4))}}
    config = snella.SnellaConfig(rank=4, targets="fc", trainable="")
    layout = snella.Layout((4,), (6,), order=(1, 0))
    for path in ("fc", "fc/kernel"):
        adapters, _ = pytree.adapt(
            params, config, key=jax.random.key(0), layouts={path: layout}
        )
        (own,) = adapters.sites.values()
        assert own.layout == layout


@pytest.mark.reference
def test_an_equinox_module_by_way_of_a_dict():
    import equinox as eqx

    mlp = eqx.nn.MLP(6, 3, 8, 2, key=jax.random.key(0))
    params, restored = pytree.flattened(mlp)
    config = snella.SnellaConfig(
        rank=4, targets=r"layers/[01]/weight", trainable="layers/2", allocation="fixed"
    )
    with pytest.raises(TypeError, match="make its arrays a dict"):
        pytree.adapt(mlp, config, key=jax.random.key(1))
    adapters, adapted = pytree.adapt(params, config, key=jax.random.key(1))
    trainable, budgets, frozen = adapters.partition(adapted)

    def loss(trainable):
        plain = adapters.summed(pytree.join(trainable, budgets, frozen))
        return jnp.square(jax.vmap(restored(plain))(X)).mean()

    grads = jax.grad(loss)(trainable)
    assert all((np.asarray(leaf) != 0).any() for leaf in jax.tree.leaves(grads))
    merged = restored(adapters.merge(adapted))
    weights = [layer.weight + 0 for layer in mlp.layers]
    for index, weight in enumerate(adapters.weights(adapted)):
        weights[index] = weights[index] + weight.delta()
    y = X
    for index, layer in enumerate(mlp.layers):
        y = y @ weights[index].T + layer.bias
        y = jax.nn.relu(y) if index < 2 else y
    np.testing.assert_allclose(jax.vmap(merged)(X), y, atol=1e-5)
    assert np.abs(np.asarray(jax.vmap(mlp)(X) - y)).max() > 1e-3


def test_there_is_no_fused_kernel_without_a_layer(caplog):
    fall_back.cache_clear()
    adapted(implementation="pallas")
    (record,) = caplog.records
    assert "there is no kernel for weights of a pytree" in record.getMessage()


def test_dtypes_of_what_is_no_array():
    """None stays None, a number becomes an array of the dtype."""
    params = {"fc": jnp.ones((6, 8)), "none": None, "number": 0.5, "count": 3}
    config = snella.SnellaConfig(
        rank=4, targets="fc", trainable="", frozen_dtype=jnp.bfloat16
    )
    adapters, adapted = pytree.adapt(params, config, key=jax.random.key(0))
    assert adapted["none"] is None and adapted["number"].dtype == jnp.bfloat16
    plain = adapters.merge(adapted, unmoved_budgets=True, dtype=jnp.float16)
    assert plain["none"] is None and plain["count"] == 3
    assert {plain[n].dtype for n in ("fc", "number")} == {jnp.dtype(jnp.float16)}
