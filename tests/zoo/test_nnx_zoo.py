"""Models in the shape of other people's, trained as documented, merged and saved."""

import functools
import io

import jax.numpy as jnp
import numpy as np
import pytest
from compiled import called
from documented import trained
from flax import nnx
from oracles import oracle_deltas
from zoo.nnx_models import CLASSES, TOKENS, ZOO, Decoder

import snella_jax as snella
from snella_jax.nnx.selection import adapted_variables

LABELS = jnp.arange(8) % CLASSES


def config(member):
    return snella.SnellaConfig(
        rank=4, target_density=0.5, targets=member.targets, trainable="head"
    )


@functools.cache
def run(name):
    """A member's base, and all that the documented program made of it in 20 steps."""
    member = ZOO[name]
    base = member.build(nnx.Rngs(0))
    model = snella.adapt(base, config(member), rngs=nnx.Rngs(1), layouts=member.layouts)
    return base, trained(model, config(member), member.inputs, LABELS, epochs=20)


def outputs(model, x):
    model = nnx.clone(model)
    model.eval()
    return np.asarray(called(model, x))


def parameters(model):
    kinds = nnx.Any(nnx.Param, snella.Frozen)
    flat = nnx.to_flat_state(nnx.state(model, kinds))
    return {path: np.asarray(variable[...]) for path, variable in flat}


@pytest.mark.parametrize("name", ZOO)
def test_only_factors_and_head_train_in_one_trace(name):
    base, after = run(name)
    sharded = name == "tree_out"  # a counter of optax's starts on one device
    assert after["traces"] == 1 + sharded
    before, now = parameters(base), parameters(after["adapted"])
    changed = {path[0] for path in before if (before[path] != now[path]).any()}
    assert changed == {"head"}
    assert {n.rstrip("[]0123") for n in after["report"].names} == set(ZOO[name].place)
    for _, adapter, _ in adapted_variables(after["adapted"]):
        assert all((np.asarray(v) != 0).any() for v in adapter.factors().values())
    assert abs(after["report"].density - 0.5) < 0.01


@pytest.mark.parametrize("name", ZOO)
def test_what_is_computed_has_the_oracles_update_in_its_weights(name):
    base, after = run(name)
    member, model = ZOO[name], after["adapted"]
    plain = nnx.clone(base)
    nnx.update(plain, nnx.state(model, (nnx.BatchStat, nnx.RngState)))
    nnx.update(plain.head, nnx.state(model.head))
    for path, adapter, _ in adapted_variables(model):
        layout = adapter.site.layout
        delta = member.place[path](oracle_deltas(adapter, layout.n, layout.m))
        node = plain
        for key in path.split("/"):
            node = node[int(key)] if key.isdigit() else getattr(node, key)
        weight = node if isinstance(node, nnx.Param) else node.kernel
        weight.set_value(jnp.asarray(np.asarray(weight[...]) + np.float32(delta)))
    found = outputs(model, member.inputs)
    np.testing.assert_allclose(found, outputs(plain, member.inputs), atol=1e-5)
    np.testing.assert_allclose(found, outputs(after["model"], member.inputs), atol=1e-5)
    assert np.abs(found - outputs(base, member.inputs)).max() > 1e-3


@pytest.mark.parametrize("name", ZOO)
def test_an_adapter_from_a_file_is_the_one_that_was_saved(name, tmp_path):
    base, after = run(name)
    member, model = ZOO[name], after["adapted"]
    snella.save(model, tmp_path / "a")
    again = snella.load(base, tmp_path / "a", layouts=member.layouts)
    nnx.update(again, nnx.state(model, nnx.RngState))
    np.testing.assert_array_equal(
        outputs(again, member.inputs), outputs(model, member.inputs)
    )
    twice = snella.load(model, tmp_path / "a")  # into the adapted model
    np.testing.assert_array_equal(
        outputs(twice, member.inputs), outputs(model, member.inputs)
    )
    assert type(snella.unload(model)) is type(base)
    snella.describe(model, io.StringIO())


def test_random_streams_and_statistics_move_as_in_the_plain_model():
    base, after = run("batch_norm")
    mean = np.asarray(base.norm.mean[...])
    assert (np.asarray(after["adapted"].norm.mean[...]) != mean).all()
    _, dropped = run("several_weights")
    count = dropped["adapted"].mlp.drop.rngs.count[...]
    assert int(count) == 20  # one mask a step


def test_decoding_with_a_cache_gives_what_the_whole_sequence_gives():
    _, after = run("grouped_attention")
    attention = after["adapted"].attn
    whole = called(attention, TOKENS)
    steps = [attention.decode(TOKENS[:, t : t + 1]) for t in range(TOKENS.shape[1])]
    np.testing.assert_allclose(jnp.concatenate(steps, 1), whole, atol=1e-5)
    plain = called(Decoder(nnx.Rngs(0)).attn, TOKENS)
    assert np.abs(np.subtract(whole, plain)).max() > 1e-3


def test_the_specs_of_a_sharded_weight_stay():
    base, after = run("tree_out")
    spec = base.fc.kernel.get_metadata()
    assert spec["out_sharding"] == (None, "model")
    frozen = after["adapted"].fc.kernel
    assert frozen.get_metadata() == spec | {"trained_as": nnx.Param}
    plain = after["model"].fc.kernel
    assert (type(plain), plain.get_metadata()) == (nnx.Param, spec)
