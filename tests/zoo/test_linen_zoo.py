"""Linen models in the shape of other people's, trained as documented, merged, saved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documented import trained_linen
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from oracles import oracle_delta
from zoo.linen_models import CLASSES, IDS, ZOO

import snella_jax as snella
from snella_jax import linen

LABELS = jnp.arange(8) % CLASSES


def flat(tree):
    """Arrays by name; a name in the tree may have slashes itself."""
    return {"/".join(k): np.asarray(v) for k, v in flatten_dict(tree).items()}


def filled(tree, values):
    """The tree with other arrays, by name."""
    leaves = flatten_dict(tree)
    return unflatten_dict({k: values.get("/".join(k), v) for k, v in leaves.items()})


@functools.cache
def run(name):
    """A member's variables, and all that the documented program made of them."""
    member = ZOO[name]
    variables = jax.jit(member.module.init)(jax.random.key(0), member.inputs)
    config = snella.SnellaConfig(
        rank=4, target_density=0.5, targets=member.targets, trainable="head"
    )
    adapters, params = linen.adapt(
        member.module,
        variables,
        config,
        member.inputs,
        key=jax.random.key(1),
        layouts=member.layouts,
    )
    after = trained_linen(
        adapters,
        params,
        variables=variables,
        inputs=member.inputs,
        targets=LABELS,
        config=config,
        epochs=20,
    )
    return variables, params, after


@functools.cache
def applied(name, adapted):
    """The member's call, compiled once."""
    module = ZOO[name].module
    return jax.jit(run(name)[2]["adapters"].apply if adapted else module.apply)


def outputs(name, params, adapted=False):
    carried = run(name)[2]["carried"]
    return applied(name, adapted)({"params": params, **carried}, ZOO[name].inputs)


def adapter_of(leaves, key):
    """Factors and budget of the weight of this name."""
    at = f"{key}_adapter/"
    if key.endswith("/kernel"):
        at = key.removesuffix("kernel") + "adapter/"
    own = {k.removeprefix(at): v for k, v in leaves.items() if k.startswith(at)}
    budget, _ = own.pop("budget"), own.pop("allocated_at")
    return own, budget


def base(name):
    return nn.meta.unbox(run(name)[0]["params"])


@pytest.mark.parametrize("name", ZOO)
def test_only_factors_and_head_train_in_one_trace(name):
    _, start, after = run(name)
    assert after["traces"] == 1
    first, before, now = flat(base(name)), flat(start), flat(after["params"])
    changed = {k for k in now if (before[k] != now[k]).any()}
    assert {k.split("/")[0] for k in changed if "adapter" not in k} == {"head"}
    for key in first.keys() - changed:
        np.testing.assert_array_equal(now[key], first[key])
    own = [k for k in now if k.endswith(("adapter/a", "adapter/b"))]
    assert len(own) == 2 * len(ZOO[name].place) and set(own) < changed
    assert abs(after["report"].density - 0.5) < 0.01


@pytest.mark.parametrize("name", ZOO)
def test_what_is_computed_has_the_oracles_update_in_its_weights(name):
    _, _, after = run(name)
    adapters, member = after["adapters"], ZOO[name]
    first, now = flat(base(name)), flat(after["params"])
    plain = {k: v for k, v in now.items() if k.startswith("head")}
    for key, place in member.place.items():
        own, budget = adapter_of(now, key)
        n, m = own["a"].shape[-2], own["b"].shape[-2]
        deltas = np.zeros((*budget.shape, n, m))
        for i in np.ndindex(budget.shape):
            factors = {k: v[i] for k, v in own.items()}
            deltas[i] = oracle_delta(factors, int(budget[i]), n, m)
        plain[key] = first[key] + place(deltas).astype(np.float32)
    found = outputs(name, after["params"], adapted=True)
    expected = outputs(name, filled(base(name), plain))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    merged = outputs(name, adapters.merge(after["params"]))
    np.testing.assert_allclose(found, merged, atol=1e-5)
    assert np.abs(found - outputs(name, base(name))).max() > 1e-3


@pytest.mark.parametrize("name", ZOO)
def test_an_adapter_from_a_file_is_the_one_that_was_saved(name, tmp_path):
    variables, _, after = run(name)
    member, params = ZOO[name], after["params"]
    after["adapters"].save(
        params, tmp_path / "a", batch_stats=after["carried"].get("batch_stats")
    )
    again, loaded = linen.load(
        member.module,
        variables,
        tmp_path / "a",
        member.inputs,
        layouts=member.layouts,
    )
    expected = flat({"params": params, **after["carried"]})
    found = flat(loaded)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    assert again.sites == after["adapters"].sites
    assert again.places == after["adapters"].places
    assert again.names == after["adapters"].names


def mix_k(factors, budget):
    """The gated update of one matrix in plain jnp, for gradients; no ties."""
    difference = factors["a"][:, :, None] - factors["b"][:, None]
    root = jnp.sqrt((difference**2).sum(-1))
    kappa = jnp.einsum("p,pnm->nm", factors["piece_coeff"], root)
    delta = kappa + factors["alpha"] * jax.nn.softmax(kappa, 1) + factors["beta"]
    size = jnp.abs(delta)
    largest = jnp.sort(jax.lax.stop_gradient(size).ravel())[::-1]
    tau = jnp.concatenate([largest, jnp.zeros(1)])[budget]
    return jnp.where(size > tau, delta * (size - tau), 0)


def test_gradients_are_those_of_the_update_in_plain_jnp():
    name = "tied_head"
    _, start, after = run(name)
    adapters, place = after["adapters"], ZOO[name].place
    trainable, budgets, frozen = adapters.partition(start)
    budgets = jax.tree.map(lambda budget: budget // 2, budgets)

    def loss(apply, params):
        return jnp.square(apply({"params": params}, IDS)).sum()

    def adapted(trainable):
        return loss(adapters.apply, linen.join(trainable, budgets, frozen))

    def plain(trainable):
        leaves = flatten_dict(linen.join(trainable, budgets, frozen), sep="/")
        weights = {k: v for k, v in leaves.items() if "adapter/" not in k}
        for key in place:
            weights[key] += place[key](mix_k(*adapter_of(leaves, key)))
        return loss(ZOO[name].module.apply, unflatten_dict(weights, sep="/"))

    found, expected = (flat(jax.jit(jax.grad(f))(trainable)) for f in (adapted, plain))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = np.abs(value).max()
        assert scale > 0
        np.testing.assert_allclose(found[key], value, atol=1e-4 * scale, err_msg=key)


def test_decoding_with_a_cache_gives_what_the_whole_sequence_gives():
    _, _, after = run("decoder")
    apply = jax.jit(
        lambda variables, ids: after["adapters"].apply(
            variables, ids, decode=True, mutable=["cache"]
        )
    )
    variables, logits = {"params": after["params"]}, []
    for t in range(IDS.shape[1]):
        found, moved = apply(variables, IDS[:, t : t + 1])
        variables, logits = variables | moved, [*logits, found]
    whole = outputs("decoder", after["params"], adapted=True)
    np.testing.assert_allclose(jnp.mean(jnp.stack(logits), 0), whole, atol=1e-5)


def test_running_statistics_move_and_what_a_layer_sows_is_there():
    variables, _, after = run("batch_norm")
    moved = flat(after["carried"]["batch_stats"])
    for key, value in flat(variables["batch_stats"]).items():
        assert (moved[key] != value).any(), key
    own = {"params": after["params"], **after["carried"]}
    _, sown = after["adapters"].apply(
        own, ZOO["batch_norm"].inputs, mutable=["intermediates"]
    )
    assert sown["intermediates"]["conv"]["size"][0] > 0


def test_the_names_of_a_stacked_weight_s_axes_are_those_of_its_adapter():
    _, params, after = run("scan_axis_1")
    specs = after["adapters"].specs(params)
    spec = jax.sharding.PartitionSpec
    own = specs["layers"]["wi"]
    assert own["kernel"] == spec("embed", "layers", "mlp")
    assert own["adapter"]["a"] == spec("layers", None, "embed", None)
    assert own["adapter"]["b"] == spec("layers", None, "mlp", None)
    assert own["adapter"]["budget"] == own["adapter"]["alpha"] == spec("layers")
    assert specs["head"]["kernel"] == specs["layers"]["norm"]["scale"] == spec()
    assert jax.tree.structure(specs) == jax.tree.structure(params)
