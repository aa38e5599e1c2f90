"""The programs of docs/zoo.md, on small models in the shape of those they name."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documented import blocks
from flax import nnx
from flax.traverse_util import flatten_dict
from oracles import oracle_delta
from places import ROOT
from zoo import published_shapes as shapes
from zoo.published_shapes import TOKENS, D, H, K, S

BEGINNING, *PROGRAMS = blocks("docs/zoo.md")
NAMES = re.findall(r"^## (\w+)$", (ROOT / "docs/zoo.md").read_text("utf-8"), re.M)


def same(deltas):
    return deltas


def outputs(*axes):
    """`[..., n, m]` with the axes of the outputs apart."""
    return lambda deltas: deltas.reshape(*deltas.shape[:-1], *axes)


def inputs(*axes):
    """`[..., n, m]` with the axes of the inputs apart."""
    return lambda deltas: deltas.reshape(*deltas.shape[:-2], *axes, deltas.shape[-1])


def behind(place):
    """Layers behind the first axis."""
    return lambda deltas: np.swapaxes(place(deltas), 0, 1)


def expert(end):
    llm = "PaliGemma/llm/layers"
    return {
        f"{llm}/attn/q_einsum{end}/w": same,
        f"{llm}/attn/kv_einsum{end}/w": same,
        f"{llm}/attn/attn_vec_einsum{end}/w": inputs(H, S),
        f"{llm}/mlp{end}/gating_einsum": same,
        f"{llm}/mlp{end}/linear": same,
    }


QKV, FLAX = ("query", "key", "value"), (H, D // H)
BLOCK, LAYERS = "Transformer/encoderblock_0", "decoder/layers"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_0"
# For each weight the update from those of its matrices, `[*lead, n, m]`.
PLACES = {
    "bonsai": {f"layers/0/attention/{n}": outputs(*FLAX) for n in QKV}
    | {"layers/0/attention/out": inputs(*FLAX)}
    | {f"layers/0/linear{i}": same for i in (1, 2)},
    "big_vision": {f"{ATTENTION}/{n}": outputs(*FLAX) for n in QKV}
    | {f"{ATTENTION}/out": inputs(*FLAX)}
    | {f"{BLOCK}/MlpBlock_0/Dense_{i}": same for i in (0, 1)},
    "tunix": {
        "layers/0/attn/q_proj/w": outputs(H, S),
        "layers/0/attn/k_proj/w": outputs(K, S),
        "layers/0/attn/v_proj/w": outputs(K, S),
        "layers/0/attn/o_proj/w": inputs(H, S),
    }
    | {f"layers/0/mlp/{n}_proj": same for n in ("gate", "up", "down")},
    "openpi": expert("") | expert("_1"),
    "MaxText": {
        f"{LAYERS}/self_attention/query": behind(outputs(H, S)),
        f"{LAYERS}/self_attention/key": behind(outputs(K, S)),
        f"{LAYERS}/self_attention/value": behind(outputs(K, S)),
        f"{LAYERS}/self_attention/out": behind(inputs(H, S)),
    }
    | {f"{LAYERS}/mlp/{n}": behind(same) for n in ("wi_0", "wi_1", "wo")},
    "equinox": {f"layers/{i}/weight": np.transpose for i in (0, 1)},
    "haiku": {f"mlp/~/linear_{i}/w": same for i in (0, 1)},
}


def drawn(module):
    params = jax.jit(module.init)(jax.random.key(0), TOKENS)["params"]
    return nn.meta.unbox(params)


def given(name):
    """What a program takes for granted, and how its loss calls the model."""
    match name:
        case "bonsai":
            model = shapes.Bonsai(nnx.Rngs(0))
            return {"model": model}, lambda model, x: model(x, rngs=None)
        case "big_vision":
            model = shapes.BigVision()
            given = {"model": model, "params": drawn(model), "images": TOKENS}
            return given, lambda model, x: model(x)[0]
        case "tunix":
            return {"model": shapes.Tunix(nnx.Rngs(0))}, lambda model, x: model(x)
        case "openpi":
            model = shapes.Pi(nnx.Rngs(0))
            graphdef, _, rest = nnx.split(model, nnx.Param, ...)

            def call(params, x):
                return nnx.merge(graphdef, params, rest, copy=True)(x)

            return {"model": model}, call
        case "MaxText":
            model = shapes.MaxText()
            given = {"model": model, "params": drawn(model), "arguments": [TOKENS]}
            return given, lambda model, x: model(x)
        case "equinox":
            model = shapes.equinox_mlp()

            def call(params, x):
                *hidden, last = (params["layers"][str(i)] for i in range(3))
                x = x.reshape(-1, D)
                for layer in hidden:
                    x = jax.nn.relu(x @ layer["weight"].T + layer["bias"])
                return x @ last["weight"].T + last["bias"]

            return {"model": model}, call
        case "haiku":
            params = shapes.haiku_params()
            return {"params": params}, lambda p, x: shapes.haiku_apply(p, None, x)


def flat(tree):
    """Arrays by path, of a layer's `kernel` by that of the layer."""
    if isinstance(tree, nnx.Module):
        tree = nnx.to_pure_dict(nnx.state(tree, nnx.Param))
    found = {
        "/".join(map(str, k)): np.asarray(v) for k, v in flatten_dict(tree).items()
    }
    return {path.removesuffix("/kernel"): leaf for path, leaf in found.items()}


@functools.cache
def run(name):
    """What a program has named, and its state after an epoch, with its merged model."""
    here, call = given(name)
    beginning = BEGINNING.replace("10, ", "2, ").replace("100}", "1}")
    exec(beginning + PROGRAMS[NAMES.index(name)], here)

    def loss_fn(model, x):
        return jnp.square(call(model, x) - 1).mean()

    state, _ = here["state"].step(loss_fn, TOKENS)
    return here, loss_fn, state.end_of_epoch()


def test_every_section_has_a_program():
    assert list(PLACES) == NAMES and len(PROGRAMS) == len(NAMES)


@pytest.mark.parametrize("name", PLACES)
def test_a_program_adapts_the_matrices_that_it_names(name):
    here, _, state = run(name)
    place, plain = PLACES[name], state.merge()
    if name in ("big_vision", "MaxText"):
        base, merged = flat(here["params"]), flat(plain["params"])
    else:
        base, merged = flat(here.get("params", here.get("model"))), flat(plain)
    assert base.keys() == merged.keys()
    weights = {weight.path: weight for weight in state.weights()}
    assert weights.keys() == place.keys()
    for path, weight in weights.items():
        n, m = weight.site.layout.n, weight.site.layout.m
        budget = np.asarray(weight.budget)
        deltas = np.zeros((*budget.shape, n, m))
        for i in np.ndindex(budget.shape):
            own = {k: np.asarray(v)[i] for k, v in weight.factors.items()}
            deltas[i] = oracle_delta(own, int(budget[i]), n, m)
        found, expected = merged[path] - base[path], place[path](deltas)
        assert np.abs(expected).max() > 1e-3, path
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=path)
    trained = re.compile(here["config"].trainable)
    for path in merged.keys() - place.keys():
        moved = (merged[path] != base[path]).any()
        assert moved == any(map(trained.fullmatch, parents(path))), path


def parents(path):
    parts = path.split("/")
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


@pytest.mark.parametrize("name", PLACES)
def test_what_trains_is_what_is_merged(name):
    here, loss_fn, state = run(name)
    plain = state.merge()
    if name in ("big_vision", "MaxText"):
        model = functools.partial(here["model"].apply, plain)
        expected = jax.jit(lambda x: loss_fn(model, x))(TOKENS)
    else:
        expected = jax.jit(lambda x: loss_fn(plain, x))(TOKENS)
    _, loss = state.step(loss_fn, TOKENS)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.reference
def test_the_program_for_equinox_trains_its_own_module():
    import equinox as eqx

    model = eqx.nn.MLP(D, 3, 12, 2, key=jax.random.key(0))
    exec(BEGINNING + PROGRAMS[NAMES.index("equinox")], here := {"model": model})

    def loss_fn(params, x):
        return jnp.square(jax.vmap(here["restored"](params))(x) - 1).mean()

    x = TOKENS[:, 0]
    state, first = here["state"].step(loss_fn, x)
    _, second = state.step(loss_fn, x)
    assert second < first
    plain = here["restored"](state.merge(unmoved_budgets=True))
    assert isinstance(plain, eqx.nn.MLP)
    y = x
    for i, layer in enumerate(plain.layers):
        y = y @ layer.weight.T + layer.bias
        y = jax.nn.relu(y) if i < 2 else y
    np.testing.assert_allclose(jax.vmap(plain)(x), y, atol=1e-5)
    assert (plain.layers[0].weight != model.layers[0].weight).any()
