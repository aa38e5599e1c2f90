"""New adapters lie where their weights do, so that a step compiles once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import snella_jax as snella
from snella_jax import Layout, linen, pytree
from snella_jax.core.config import Rule
from snella_jax.core.placement import beside
from snella_jax.core.weight import Site

CONFIG = snella.SnellaConfig(rank=4, targets="fc|fc2", trainable="head")
X = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
# Of every kernel on a mesh (data, model).
SPECS = {
    "tensor parallel": {"fc": P(None, "model"), "fc2": P("model"), "head": P()},
    "fully sharded": {"fc": P("data"), "fc2": P("data"), "head": P("data")},
    "both": {"fc": P("data", "model"), "fc2": P("model", "data"), "head": P("data")},
    "replicated": {},
}


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))


def split(axes):
    """The examples, over a mesh's axis `data`."""
    return jax.device_put(X, NamedSharding(axes, P("data")))


class Net(nnx.Module):
    def __init__(self, rngs, init=lambda *names: nnx.initializers.lecun_normal()):
        self.fc = nnx.Linear(8, 16, kernel_init=init(None, "model"), rngs=rngs)
        self.fc2 = nnx.Linear(16, 8, kernel_init=init("model", None), rngs=rngs)
        self.head = nnx.Linear(8, 4, kernel_init=init(None, None), rngs=rngs)

    def __call__(self, x):
        return self.head(self.fc2(nnx.relu(self.fc(x))))


def placed(tree, specs, axes):
    """A tree of dicts whose kernels lie as the specs say."""

    def where(path, leaf):
        names = [str(getattr(key, "key", key)) for key in path]
        whole = "bias" in names or "bias" in str(path)
        spec = P() if whole else specs.get(names[0], P())
        return jax.device_put(leaf, NamedSharding(axes, spec))

    return jax.tree_util.tree_map_with_path(where, tree)


def compilations(trainable, budgets, logits, x):
    """Counts those of three steps, with new budgets before the last."""
    tx = optax.chain(snella.track_importance(), optax.trace(0.9), optax.scale(-0.1))
    opt_state = tx.init(trainable)

    @jax.jit
    def step(trainable, opt_state, budgets, x):
        grads = jax.grad(lambda t: jnp.sin(logits(t, budgets, x)).sum())(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    for index in range(3):
        if index == 2:
            budgets, _ = snella.reallocate(budgets, opt_state, 60)
        trainable, opt_state = step(trainable, opt_state, budgets, x)
    return step._cache_size()


@pytest.mark.parametrize("name", SPECS)
def test_a_step_over_a_sharded_model_compiles_once(name, tmp_path):
    """Freshly adapted, and loaded from a file."""
    axes, model = mesh(), Net(nnx.Rngs(0))
    nnx.update(model, placed(nnx.state(model), SPECS[name], axes))
    adapted = snella.adapt(model, CONFIG, rngs=nnx.Rngs(1))
    if name == "tensor parallel":
        assert adapted.fc.adapter.b[...].sharding.spec == P(None, "model")
        assert adapted.fc2.adapter.a[...].sharding.spec == P(None, "model")
        assert adapted.fc.adapter.a[...].sharding.is_fully_replicated
    snella.save(adapted, tmp_path / "adapter")
    loaded = snella.load(model, tmp_path / "adapter")
    for one in (adapted, loaded):
        graphdef, trainable, budgets, frozen = snella.partition(one)
        assert all(x.committed for x in jax.tree.leaves((trainable, budgets)))
        assert budgets["fc"]["adapter"]["budget"][...].sharding.is_fully_replicated

        def logits(trainable, budgets, x, graphdef=graphdef, frozen=frozen):
            return nnx.merge(graphdef, trainable, budgets, frozen)(x)

        assert compilations(trainable, budgets, logits, split(axes)) == 1


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="fc2")(nn.relu(nn.Dense(16, name="fc")(x)))
        return nn.Dense(4, name="head")(x)


@pytest.mark.parametrize("binding", ["Linen", "pytree"])
def test_the_other_bindings(binding, tmp_path):
    axes, net, key = mesh(), LinenNet(), jax.random.key(0)
    plain = placed(net.init(key, X)["params"], SPECS["tensor parallel"], axes)
    folder = tmp_path / "adapter"
    if binding == "Linen":
        variables = {"params": plain}
        fresh = linen.adapt(net, variables, CONFIG, X, key=key)
        fresh[0].save(fresh[1], folder)
        adapters, loaded = linen.load(net, variables, folder, X)
        both = [fresh, (adapters, loaded["params"])]
    else:
        fresh = pytree.adapt(plain, CONFIG, key=key)
        fresh[0].save(fresh[1], folder)
        both = [fresh, pytree.load(plain, folder)]
    for adapters, params in both:
        trainable, budgets, frozen = adapters.partition(params)

        def logits(trainable, budgets, x, adapters=adapters, frozen=frozen):
            params = linen.join(trainable, budgets, frozen)
            if binding == "Linen":
                return adapters.apply({"params": params}, x)
            return net.apply({"params": adapters.summed(params)}, x)

        assert compilations(trainable, budgets, logits, split(axes)) == 1


def test_a_model_made_under_jit():
    """By the metadata of its kernels, which its factors have, too."""
    axes = mesh()
    with jax.set_mesh(axes):

        @nnx.jit
        def create():
            def init(*names):
                kernel = nnx.initializers.lecun_normal()
                return nnx.with_partitioning(kernel, names)

            return snella.adapt(Net(nnx.Rngs(0), init), CONFIG, rngs=nnx.Rngs(1))

        model = create()
        specs = nnx.get_partition_spec(nnx.state(model.fc.adapter))
        assert specs["b"].get_value() == P(None, "model", None)
        assert model.fc.adapter.b[...].sharding.spec == P(None, "model")
        graphdef, trainable, budgets, frozen = snella.partition(model)

        def logits(trainable, budgets, x):
            return nnx.merge(graphdef, trainable, budgets, frozen)(x)

        assert compilations(trainable, budgets, logits, split(axes)) == 1


@pytest.mark.parametrize(
    "layout, stack, stacked_at, spec, a, b",
    {
        "heads": (Layout((8,), (2, 4)), (), (), P(None, "model"), P(), P(0, "model")),
        "within heads": (Layout((8,), (2, 4)), (), (), P(0, 0, "model"), P(), P()),
        "a stack": (
            *(Layout((8,), (4,)), (2,), (), P("data", None, "model")),
            *(P("data"), P("data", 0, "model")),
        ),
        "a stack behind": (
            *(Layout((8,), (4,)), (2,), (1,), P("model", "data")),
            *(P("data", 0, "model"), P("data")),
        ),
        "fused": (
            *(Layout((8,), (12,)).split(3), (), (), P("data", "model")),
            *(P(0, 0, "data"), P()),
        ),
        "turned": (
            *(Layout((8,), (4,), (), (1, 0)), (), (), P("data", "model")),
            *(P(0, "model"), P(0, "data")),
        ),
    }.values(),
)
def test_factors_are_split_as_the_axes_that_they_stand_for(
    layout, stack, stacked_at, spec, a, b
):
    site = Site(Rule(rank=4, kernel="rbf"), layout, stack, False, stacked_at)
    lead = site.lead
    factors = {
        "a": jnp.zeros((*lead, 1, layout.n, 4)),
        "b": jnp.zeros((*lead, 1, layout.m, 4)),
        "alpha": jnp.zeros(lead),
    }
    counts = np.zeros(lead, np.int32), np.zeros(lead, np.int32)
    axes = mesh()
    spec, a, b = (P(*(part or None for part in own)) for own in (spec, a, b))
    w0 = jax.device_put(jnp.zeros(site.shape), NamedSharding(axes, spec))
    placed, budget, _ = beside(site, w0, (factors, *counts))
    assert (placed["a"].sharding.spec, placed["b"].sharding.spec) == (a, b)
    expected = NamedSharding(axes, P(*a[: len(lead)]))
    assert placed["alpha"].sharding.is_equivalent_to(expected, len(lead))
    assert budget.sharding.is_fully_replicated and len(budget.sharding.device_set) == 4


@pytest.mark.parametrize("device", [None, 2])
def test_one_device(device):
    """A weight committed to one takes its adapter there; other weights stay free."""
    model = Net(nnx.Rngs(0))
    if device is not None:
        nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[device]))
    adapted = snella.adapt(model, CONFIG, rngs=nnx.Rngs(1))
    for leaf in jax.tree.leaves(nnx.state(adapted)):
        assert leaf.committed == (device is not None)
        assert leaf.devices() == {jax.devices()[device or 0]}


@pytest.mark.parametrize("in_a_mesh", [True, False])
def test_a_step_on_one_device_compiles_once(in_a_mesh):
    device = jax.devices()[0]
    alone = jax.make_mesh(
        (1,), ("data",), axis_types=(AxisType.Auto,), devices=[device]
    )
    model = Net(nnx.Rngs(0))
    place = NamedSharding(alone, P()) if in_a_mesh else device
    nnx.update(model, jax.device_put(nnx.state(model), place))
    adapted = snella.adapt(model, CONFIG, rngs=nnx.Rngs(1))
    graphdef, trainable, budgets, frozen = snella.partition(adapted)

    def logits(trainable, budgets, x):
        return nnx.merge(graphdef, trainable, budgets, frozen)(x)

    x = jax.device_put(X, place)
    assert compilations(trainable, budgets, logits, x) == 1


def test_explicit_axes_have_whole_factors():
    axes, model = mesh(AxisType.Explicit), Net(nnx.Rngs(0))
    nnx.update(model, placed(nnx.state(model), SPECS["tensor parallel"], axes))
    with jax.set_mesh(axes):
        adapted = snella.adapt(model, CONFIG, rngs=nnx.Rngs(1))
        assert adapted.fc.adapter.b[...].sharding.spec == P(None, None, None)
        assert adapted.fc.adapter.b[...].sharding.mesh == axes
