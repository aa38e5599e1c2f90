"""Several adapters on one base: sums, one for each example, swaps without retracing."""

import chex
import jax
import numpy as np
import pytest
from every_kind import IMAGES, KINDS, Every, outputs
from flax import nnx

import snella_jax as snella
from snella_jax.nnx import multi_adapter
from snella_jax.nnx.selection import weights_of


def settings(**changes):
    own = {"rank": 4, "targets": KINDS, "trainable": "head", "allocation": "fixed"}
    return snella.SnellaConfig(**(own | changes))


@pytest.fixture(scope="module")
def models():
    base = Every(nnx.Rngs(0))
    base.eval()
    made = {
        name: snella.adapt(base, settings(), rngs=nnx.Rngs(seed))
        for seed, name in enumerate(("pets", "cars", "planes"), 1)
    }
    for seed, model in enumerate(made.values()):
        model.head.kernel[...] = jax.random.normal(jax.random.key(seed), (8, 3))
    return {"none": base, **made}


def test_the_arrays_of_the_base_are_there_once(models):
    pointers = {m.qkv.kernel[...].unsafe_buffer_pointer() for m in models.values()}
    assert len(pointers) == 1


def test_a_batch_with_an_adapter_for_each_example(models):
    ids = ["cars", "none", "pets", "cars", "planes"]
    found = snella.per_example(models, ids, IMAGES)
    for index, name in enumerate(ids):
        alone = outputs(models[name])[index]
        np.testing.assert_allclose(found[index], alone, atol=1e-5)
    assert len({tuple(row) for row in np.asarray(found).round(4).tolist()}) == 5


def test_heads_of_other_widths_are_refused_in_words(models):
    wide = nnx.clone(models["pets"])
    wide.head = nnx.Linear(8, 5, rngs=nnx.Rngs(0))
    message = r"'pets' returns \(3,\) .*'wide' \(5,\).*models of each width apart"
    with pytest.raises(ValueError, match=message):
        snella.per_example({**models, "wide": wide}, ["pets", "wide"] * 2, IMAGES[:4])


def test_adapted_and_loaded_models_share_a_program(models, tmp_path):
    snella.save(models["pets"], tmp_path / "a")
    loaded = snella.load(models["none"], tmp_path / "a")
    one, other = (nnx.clone(model) for model in (loaded, models["pets"]))
    for model in (one, other):
        model.eval()
    assert nnx.split(one)[0] == nnx.split(other)[0]
    assert hash(nnx.split(one)[0]) == hash(nnx.split(other)[0])


def test_adapters_of_equal_shapes_share_a_program(models):
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def run(graphdef, state, x):
        return nnx.merge(graphdef, state)(x)

    jitted = jax.jit(run, static_argnums=0)
    outputs = [
        jitted(*nnx.split(models[name]), IMAGES) for name in ("pets", "cars", "planes")
    ]
    assert not np.allclose(outputs[0], outputs[1])
    before = multi_adapter._run._cache_size()
    snella.per_example(models, ["pets"] * 5, IMAGES)
    once = multi_adapter._run._cache_size()
    snella.per_example(models, ["cars", "planes", "cars", "pets", "pets"], IMAGES)
    assert multi_adapter._run._cache_size() == once <= before + 1


def test_a_sum_of_updates_is_that_of_the_updates(models):
    factors = {"pets": 0.75, "cars": -0.5}
    found = snella.combine(models, factors, rest="cars")
    base = models["none"]
    own = {name: {w.path: w for w in weights_of(models[name])} for name in factors}
    for path, weight in own["pets"].items():
        node, plain = base, found
        for name in path.split("/"):
            node, plain = getattr(node, name), getattr(plain, name)
        expected = np.asarray(node.kernel[...], np.float64) + sum(
            f * np.asarray(own[n][path].delta(), np.float64) for n, f in factors.items()
        )
        np.testing.assert_allclose(plain.kernel[...], expected, atol=1e-6)
        assert type(plain) is type(node) and weight.path == path
    np.testing.assert_array_equal(
        found.head.kernel[...], models["cars"].head.kernel[...]
    )
    alone = snella.combine(models, {"pets": 1.0}, rest="pets")
    np.testing.assert_array_equal(outputs(alone), outputs(snella.merge(models["pets"])))


def test_adapters_on_other_weights_are_left_where_they_are(models):
    other = snella.adapt(models["none"], settings(targets="qkv"), rngs=nnx.Rngs(9))
    found = snella.combine(models | {"qkv": other}, {"qkv": 1.0}, rest="pets")
    base = models["none"]
    np.testing.assert_array_equal(found.conv.kernel[...], base.conv.kernel[...])
    merged = snella.merge(other)
    np.testing.assert_array_equal(found.qkv.kernel[...], merged.qkv.kernel[...])


def test_what_does_not_go_together_is_refused(models):
    with pytest.raises(ValueError, match="No model is called"):
        snella.combine(models, {"dogs": 1.0}, rest="pets")
    with pytest.raises(ValueError, match="No model is called"):
        snella.per_example(models, ["dogs"] * 5, IMAGES)
    with pytest.raises(ValueError, match="one for each example"):
        snella.per_example(models, ["pets"] * 4, IMAGES)
    other = snella.adapt(Every(nnx.Rngs(8)), settings(), rngs=nnx.Rngs(1))
    for weights, rest in (({"pets": 1, "o": 1}, "pets"), ({"pets": 1}, "o")):
        with pytest.raises(ValueError, match="has another base"):
            snella.combine(models | {"o": other}, weights, rest=rest)
    never = snella.adapt(
        models["none"], settings(allocation="adaptive"), rngs=nnx.Rngs(1)
    )
    with pytest.raises(snella.BudgetsNeverMoved):
        snella.combine(models | {"never": never}, {"never": 1}, rest="pets")


def test_other_weights_without_adapters_are_another_base(models):
    base = nnx.clone(models["none"])
    base.norm.scale[...] += 1
    other = snella.adapt(base, settings(), rngs=nnx.Rngs(1))
    together = models | {"other": other}
    message = r"'other' has another base than 'pets':\n  norm/scale: its numbers"
    with pytest.raises(ValueError, match=message):
        snella.combine(together, {"pets": 0.5, "other": 0.5}, rest="pets")
    with pytest.raises(ValueError, match="another base than 'other'"):
        snella.combine(together, {"pets": 1.0}, rest="other")
    trained = snella.adapt(base, settings(trainable="norm|head"), rngs=nnx.Rngs(1))
    trained.norm.mean[...] += 1  # what moves may differ
    found = snella.combine(models | {"t": trained}, {"t": 1.0}, rest="pets")
    np.testing.assert_array_equal(found.norm.mean[...], models["pets"].norm.mean[...])


def test_a_base_that_is_stacked_otherwise_is_another():
    """The same numbers; but a sum of updates needs the same places."""

    class Rows(nnx.Module):
        def __init__(self, *shapes):
            rng = np.random.default_rng(0)
            for index, shape in enumerate(shapes):
                layer = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
                layer.kernel.set_value(jax.numpy.asarray(rng.normal(size=shape), "f4"))
                setattr(self, f"fc{index}", layer)

    own = settings(targets="fc.*", trainable="")
    one, two = (
        snella.adapt(Rows(*shapes), own, rngs=nnx.Rngs(1))
        for shapes in ([(2, 4, 4)], [(4, 4), (4, 4)])
    )
    with pytest.raises(ValueError, match=r"stacked or named otherwise: there is no fc"):
        snella.combine({"one": one, "two": two}, {"two": 1.0}, rest="one")


def test_a_trained_weight_is_not_the_base_of_another_s_update(models):
    """The head of `pets` trained; `head` has an adapter on that of the base."""
    own = settings(targets="head", trainable="")
    head = snella.adapt(models["none"], own, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"than 'pets':\n  head/kernel: its numbers"):
        snella.combine(models | {"head": head}, {"head": 1.0}, rest="pets")
    snella.combine(models | {"head": head}, {"head": 1.0}, rest="none")


def test_the_rest_may_be_the_base(models):
    found = snella.combine(models, {"pets": 1.0}, rest="none")
    base, pets = models["none"], snella.merge(models["pets"])
    np.testing.assert_array_equal(found.head.kernel[...], base.head.kernel[...])
    np.testing.assert_array_equal(found.qkv.kernel[...], pets.qkv.kernel[...])
