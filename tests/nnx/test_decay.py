"""Which leaves decay: by kind, whatever their stacking, method or binding."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx

import snella_jax as snella
from experiments.methods.first_stage import Staged
from experiments.methods.registry import METHODS
from snella_jax import linen, models, pytree
from snella_jax.core.paths import path_of

MATRICES = {"kernel", "a", "b"}
OTHERS = {
    *("bias", "scale", "shift", "magnitude", "values"),
    *("alpha", "beta", "gamma", "piece_coeff"),
    *("cls_token", "pos_embed", "prompts", "queries"),
}


def decayed(mask):
    """Paths of what decays."""
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    return {"/".join(path_of(path)) for path, decays in leaves if decays}


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unrolled"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method(name, stacked):
    """All matrices and nothing else, of Variables and of their arrays."""
    base, method = tiny.base(), tiny.CONFIG.settings[name]
    base = base if stacked else models.unstack(base)
    scope = tiny.CONFIG.scope()
    if isinstance(method, Staged):
        places = tiny.SUBNET if name == "noah" else method.typical(base, scope)
        scope = dataclasses.replace(scope, places=places)
    state = nnx.state(method.adapt(base, scope), nnx.Param)
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}
    names = {path.split("/")[-1] for path in paths}
    assert names <= MATRICES | OTHERS
    expected = {path for path in paths if path.split("/")[-1] in MATRICES}
    assert decayed(tiny.CONFIG.recipe(name).decays(state)) == expected
    assert decayed(snella.decay_mask(nnx.as_pure(state))) == expected  # nnx.Optimizer's
    # And of all that is adapted only by factors, the factors.
    held = {"lora", "dora", "spt_lora", "noah", *snella_methods()}
    assert bool(names & {"a", "b"}) == (name in held)


def snella_methods():
    return {name for name in METHODS if "snell" in name} | {"klora", "mixk"}


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unrolled"])
def test_noahs_supernet(stacked):
    base = tiny.base() if stacked else models.unstack(tiny.base())
    net = METHODS["noah"].supernet(base, tiny.CONFIG.scope())
    state = nnx.state(net, nnx.Param)
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}
    expected = {path for path in paths if path.split("/")[-1] in MATRICES}
    assert sum(path.endswith("lora/a") for path in expected) in (3, 6)
    assert decayed(tiny.CONFIG.recipe("noah").decays(state)) == expected


def test_decay_mask_goes_by_name():
    """In stacked blocks a bias has two axes and alpha one: no rank tells them apart."""
    stacked = jnp.ones((12, 8))
    params = {
        "blocks": {
            "fc1": {
                "kernel": jnp.ones((12, 8, 8)),
                "bias": stacked,
                "adapter": {
                    **{name: jnp.ones((12, 2, 8, 4)) for name in "ab"},
                    **{name: jnp.ones(12) for name in ("alpha", "beta", "gamma")},
                    "piece_coeff": jnp.ones((12, 2)),
                },
            },
            "norm": {"scale": stacked, "bias": stacked},
        },
        "embed": {"embedding": stacked},
        "a": jnp.ones(3),  # not a factor: there is no b beside it
        "cls_token": jnp.ones((1, 1, 8)),
        "pos_embed": jnp.ones((1, 9, 8)),
        "head": {"kernel": stacked, "bias": jnp.ones(8)},
    }
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, value in jax.tree_util.tree_leaves_with_path(
            snella.decay_mask(params)
        )
        if value
    }
    assert decayed == {
        "blocks/fc1/kernel",
        "blocks/fc1/adapter/a",
        "blocks/fc1/adapter/b",
        "embed/embedding",
        "head/kernel",
    }


def shaped(tree):
    return jax.tree.map(jnp.zeros, tree, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize("lead", [(), (12,)], ids=["unrolled", "stacked"])
def test_w_and_weight(lead):
    """Names of Haiku, Equinox and one's own: matrices decay, a norm's scales not."""
    params = shaped(
        {
            "haiku": {"w": (*lead, 8, 4), "b": (*lead, 4)},
            "equinox": {"weight": (*lead, 4, 8), "bias": (*lead, 4)},
            "plain": {"weight": (*lead, 4, 8)},
            "conv": {"weight": (*lead, 4, 8, 3, 3), "bias": (*lead, 4, 1, 1)},
            "affine": {"weight": (*lead, 4), "bias": (*lead, 4)},
            "norm1": {"weight": (*lead, 4)},
            "layer_norm": {"w": (*lead, 4)},
            "ln_1": {"weight": (*lead, 4), "bias": (*lead, 4)},
            "prelu": {"weight": ()},
            "lora": {"a": (*lead, 8, 2), "b": (*lead, 4, 2)},
            "peft": {"lora_a": (*lead, 8, 2), "lora_b": (*lead, 2, 4)},
            "tokens": {"embedding": (*lead, 50, 4)},
            "position_embeddings": {"embedding": (*lead, 9, 4)},
            "pos_embed": {"weight": (*lead, 9, 4)},
            "wpe": {"embedding": (*lead, 9, 4)},
            "relative_attention_bias": {"embedding": (*lead, 9, 4)},
            "decomposition": {"w": (*lead, 8, 4)},
        }
    )
    assert decayed(snella.decay_mask(params)) == {
        *("haiku/w", "equinox/weight", "plain/weight", "conv/weight"),
        *("lora/a", "lora/b", "peft/lora_a", "peft/lora_b"),
        *("tokens/embedding", "decomposition/w"),
    }


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.LayerNorm()(nn.Dense(6, name="fc")(x)))


CONFIG = snella.SnellaConfig(rank=4, targets="fc|w", trainable="head|.*Norm.*")
OF_AN_ADAPTER = {"a", "alpha", "b", "beta", "piece_coeff"}


def test_linen():
    net, x, key = Net(), jnp.ones((1, 4)), jax.random.key(0)
    adapters, params = linen.adapt(net, net.init(key, x), CONFIG, x, key=key)
    trainable, _, _ = adapters.partition(params)
    assert trainable["fc"]["adapter"].keys() == OF_AN_ADAPTER
    assert decayed(snella.decay_mask(trainable)) == {
        *("fc/adapter/a", "fc/adapter/b", "head/kernel"),
    }


def test_a_tree_under_optax():
    """Without a gradient, exactly the parameters in the mask move."""
    params = shaped({"w": (4, 6), "head": {"w": (6, 2), "b": (2,)}})
    params = jax.tree.map(lambda x: x + 1, params)
    config = snella.SnellaConfig(rank=4, targets="w", trainable="head")
    adapters, params = pytree.adapt(params, config, key=jax.random.key(0))
    trainable, _, _ = adapters.partition(params)
    tx = optax.adamw(0.1, weight_decay=0.1, mask=snella.decay_mask)
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    updates, _ = tx.update(zeros, tx.init(trainable), trainable)
    moved = jax.tree.map(lambda x: bool(np.any(x)), updates)
    assert decayed(moved) == {"w_adapter/a", "w_adapter/b", "head/w"}
