"""The NNX binding: which layers are adapted, what they compute, what merges back."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import called
from flax import nnx
from generic import run
from modules import Holder

import snella_jax as snella
from snella_jax.nnx.selection import adapted_layers, weights_of

RANK = 4


def test_a_shared_module_is_adapted_once_and_stays_shared():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.first = self.second = nnx.Linear(6, 6, rngs=rngs)

        def __call__(self, x):
            return self.second(self.first(x))

    config = snella.SnellaConfig(rank=RANK, targets="first|second", trainable="")
    model = snella.adapt(Twice(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    assert model.first is model.second
    assert snella.adapted_weights(model) == 36
    merged = snella.merge(model, unmoved_budgets=True)
    assert merged.first is merged.second and type(merged.first) is nnx.Linear


def test_a_tied_weight_trains_by_each_of_its_names():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(6, 6, rngs=rngs)
            self.one, self.two = (nnx.Linear(6, 6, rngs=rngs) for _ in range(2))
            self.two.kernel = self.one.kernel

    for name in ("one", "two"):
        config = snella.SnellaConfig(rank=RANK, targets="fc", trainable=name)
        model = snella.adapt(Tied(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
        assert type(model.one.kernel) is nnx.Param
        assert type(getattr(model, name).bias) is nnx.Param


class Net(nnx.Module):
    def __init__(self, rngs, **options):
        self.fc1 = nnx.Linear(6, 8, rngs=rngs, **options)
        self.fc2 = nnx.Linear(8, 6, rngs=rngs, **options)
        self.head = nnx.Linear(6, 3, rngs=rngs, **options)

    def __call__(self, x):
        return self.head(nnx.relu(self.fc2(nnx.relu(self.fc1(x)))))


def net(**options):
    settings = {"rank": RANK, "targets": "fc.", "trainable": "head"} | options
    return snella.adapt(
        Net(nnx.Rngs(0)), snella.SnellaConfig(**settings), rngs=nnx.Rngs(1)
    )


def test_partition_names_every_leaf_of_the_model():
    _, trainable, budgets, frozen = snella.partition(net())
    paths = [
        {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}
        for state in (trainable, budgets, frozen)
    ]
    factors = ("a", "b", "alpha", "beta", "piece_coeff")
    layers = ("fc1", "fc2")
    assert paths[0] == {f"{x}/adapter/{f}" for x in layers for f in factors} | {
        "head/kernel", "head/bias",
    }  # fmt: skip
    ledger = ("budget", "allocated_at")
    assert paths[1] == {f"{x}/adapter/{f}" for x in layers for f in ledger}
    assert paths[2] == {f"{x}/{f}" for x in layers for f in ("kernel", "bias")}


def test_fixed_piece_coefficients_stay_in_the_tree_but_do_not_train():
    kernel = snella.kernels.mix_k(temperature=True, learn_piece_coeff=False)
    _, trainable, _, frozen = snella.partition(net(kernel=kernel))
    assert "piece_coeff" not in trainable["fc1"]["adapter"]
    assert "gamma" in trainable["fc1"]["adapter"]
    np.testing.assert_allclose(
        frozen["fc1"]["adapter"]["piece_coeff"][...], [0.1, -0.1]
    )


def test_overrides_first_match_holds():
    model = net(overrides={"fc1": {"rank": 2}, "fc.": {"gate": "soft", "rank": 6}})
    assert (model.fc1.adapter.rule.rank, model.fc1.adapter.rule.gate) == (2, "product")
    assert (model.fc2.adapter.rule.rank, model.fc2.adapter.rule.gate) == (6, "soft")
    assert model.fc2.adapter.a.shape == (2, 8, 3)


def test_starting_budgets_are_exact_and_uniform():
    model = net(initial_density=0.37)
    budgets = [int(layer.adapter.budget[...]) for _, layer in adapted_layers(model)]
    assert sum(budgets) == round(0.37 * 96) and max(budgets) - min(budgets) <= 1
    fixed = net(allocation="fixed", target_density=0.25)
    assert int(fixed.fc1.adapter.budget[...]) == 12


@pytest.mark.parametrize("path", ["merged", "parallel"])
@pytest.mark.parametrize("w", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("x", [jnp.float32, jnp.bfloat16])
def test_output_dtype_is_the_plain_layers(path, w, dtype, x):
    plain = Holder(nnx.Linear(6, 5, dtype=dtype, param_dtype=w, rngs=nnx.Rngs(0)))
    config = snella.SnellaConfig(rank=RANK, targets="layer", trainable="", path=path)
    model = snella.adapt(plain, config, rngs=nnx.Rngs(1))
    assert model.layer.adapter.a.dtype == jnp.float32
    inputs = jnp.ones((2, 6), x)
    assert jax.eval_shape(model, inputs).dtype == jax.eval_shape(plain, inputs).dtype


def test_merging_budgets_that_never_moved_raises():
    with pytest.raises(snella.BudgetsNeverMoved, match=r"fc1.*reallocate"):
        snella.merge(net())
    with pytest.raises(snella.BudgetsNeverMoved):  # it should have grown
        snella.merge(net(initial_density=0.1, target_density=1.0))
    for ready in (
        net(target_density=1.0),
        net(allocation="fixed"),
    ):
        assert type(snella.merge(ready).fc1) is nnx.Linear
    assert type(snella.merge(net(), unmoved_budgets=True).fc1) is nnx.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 5}, "rank=5 is not a positive multiple of pieces=2"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 8.0}, "rank=8.0 is not a positive multiple"),
        ({"split": 1.5}, "split=1.5: expected a whole number"),
        ({"kernel": "mixk"}, "No kernel is called 'mixk': expected linear,"),
        ({"gate": "product2"}, "No gate is called 'product2': expected product,"),
        ({"path": "merge"}, "No path is called 'merge': expected merged, parallel"),
        ({"dropout": 0.1}, 'dropout=0.1 needs path="parallel"'),
        ({"target_density": 1.3}, "target_density=1.3: expected 0 to 1"),
        ({"initial_density": -0.1}, "initial_density=-0.1"),
        ({"initial_density": 0}, "initial_density=0 lets no weight move"),
        ({"allocation": "learned"}, "expected adaptive or fixed"),
        ({"targets": "fc("}, r"regex 'fc\(' does not compile"),
        (
            {"targets": "fc9"},
            r"targets='fc9' matches no layer(.|\n)*fc1\n  fc2\n  head",
        ),
        ({"trainable": "tail"}, r"trainable='tail' matches nothing(.|\n)*head/kernel"),
        ({"overrides": {"head": {"rank": 2}}}, r"overrides: 'head' matches none"),
        (
            {"overrides": {"fc.": {"rank": 2}, "fc1": {"rank": 4}}},
            r"overrides: 'fc1' matches none(.|\n)*earlier override",
        ),
        ({"overrides": {"fc1": {"rnk": 2}}}, "has rnk: expected some of rank, kernel"),
        ({"overrides": {"fc1": {"rank": 3}}}, "rank=3 is not a positive multiple"),
        ({"split": 5}, r"fc1 cannot be adapted: split=5 does not fit"),
        ({"split": 0}, "split=0"),
    ],
)
def test_bad_configs_say_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message):
        net(**options)


def test_a_list_of_targets_is_no_regex():
    with pytest.raises(TypeError, match=r"\['fc1', 'fc2'\] is no string: expected one"):
        snella.SnellaConfig(targets=["fc1", "fc2"])


def test_bad_models_say_what_to_do():
    with pytest.raises(ValueError, match=r"has adapters already: merge\(\) it first"):
        snella.adapt(
            net(), snella.SnellaConfig(targets="fc1", trainable=""), rngs=nnx.Rngs(0)
        )
    for function in (snella.partition, snella.merge, snella.adapted_weights):
        with pytest.raises(ValueError, match="no adapters"):
            function(Net(nnx.Rngs(0)))
    late = Holder(nnx.Einsum("ab,bc->ac", (6, 5), rngs=nnx.Rngs(0)))
    late.layer.einsum_str = None
    config = snella.SnellaConfig(rank=RANK, targets="layer", trainable="")
    with pytest.raises(ValueError, match="equation is fixed when built"):
        snella.adapt(late, config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("gate", ["product", "released", "soft", "hard"])
@pytest.mark.parametrize("kernel", snella.kernels.KERNELS)
def test_every_kernel_and_gate_trains_from_the_start_or_is_refused(kernel, gate):
    """A gradient of 0 everywhere at the start would be one for ever."""

    def gradient(kernel):
        config = snella.SnellaConfig(
            rank=RANK, kernel=kernel, gate=gate, targets="layer", trainable=""
        )
        layer = Holder(nnx.Linear(6, 5, rngs=nnx.Rngs(0)))
        graphdef, trainable, *rest = snella.partition(
            snella.adapt(layer, config, rngs=nnx.Rngs(1))
        )
        x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)

        def loss(trainable):
            return jnp.sum(nnx.merge(graphdef, trainable, *rest)(x) ** 2)

        found = run(jax.grad(loss), trainable)
        return max(np.abs(g).max() for g in jax.tree.leaves(found))

    if kernel == "linear" and gate in ("product", "released"):
        with pytest.raises(ValueError, match="passes no gradient"):
            gradient(kernel)
        kernel = snella.kernels.linear(zero_init=False)
    assert gradient(kernel) > 1e-4


def test_linear_from_zero_needs_the_whole_budget_at_the_start():
    with pytest.raises(ValueError, match="lets no weight move"):
        snella.SnellaConfig(kernel="linear", gate="hard", initial_density=0.5)
    own = {"fc1": {"kernel": "linear", "gate": "hard"}}
    with pytest.raises(ValueError, match="lets no weight move"):
        snella.SnellaConfig(initial_density=0.5, overrides=own)
    snella.SnellaConfig(overrides=own)


def test_fixed_budgets_do_not_move():
    config = snella.SnellaConfig(
        rank=RANK, targets="fc.", trainable="head", allocation="fixed"
    )
    assert {config.schedule(1000, 5)(t) for t in range(5)} == {300}
    model = snella.adapt(Net(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    _, trainable, budgets, _ = snella.partition(model)
    tx = snella.track_importance()
    _, state = tx.update(trainable, tx.init(trainable), trainable)
    with pytest.raises(ValueError, match=r"fixed(.|\n)*do not compete"):
        snella.reallocate(budgets, state, 40)


def test_partition_warns_of_state_that_a_functional_step_loses(caplog):
    class Noisy(Net):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    config = snella.SnellaConfig(rank=RANK, targets="fc.", trainable="head")
    snella.partition(net())
    assert "carry them" not in caplog.text
    snella.partition(snella.adapt(Noisy(nnx.Rngs(0)), config, rngs=nnx.Rngs(1)))
    assert "random streams" in caplog.text


def test_labels_that_match_nothing_are_refused():
    a, w = jnp.zeros((2, 3, 4)), jnp.zeros((3, 3))
    params = {
        "fc": {"kernel": w, "adapter": {"a": a, "b": a}},
        "head": {"a": w, "b": w},
    }
    found = snella.labels(params, "head")
    assert found["head"] == {"a": "trainable", "b": "trainable"}  # no factors: 2-D
    assert snella.decay_mask(params)["head"] == {"a": False, "b": False}
    with pytest.raises(ValueError, match="no match of trainable='hed'"):
        snella.labels(params, "hed")
    with pytest.raises(ValueError, match="no adapter among"):
        snella.labels({"head": w}, "head")


def test_released_preset_is_the_released_recipe():
    rule = snella.SnellaConfig.released().rule("blocks/attn/query")
    assert rule.kernel == snella.kernels.mix_k(
        temperature=True, learn_piece_coeff=False
    )
    assert (rule.gate, rule.path, rule.rank) == ("released", "parallel", 32)
    assert (rule.dropout, rule.drop_path) == (0.1, 0.1)
    out = snella.SnellaConfig.released().rule("blocks/attn/out")
    assert (out.dropout, out.drop_path) == (0.0, 0.1)


def test_flax_optimizer_trains_exactly_the_params():
    """Stateful use: `nnx.Optimizer(wrt=nnx.Param)`, budgets updated in the model."""
    model = net()
    tx = optax.chain(snella.track_importance(), optax.adam(1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (16, 6))
    frozen = nnx.state(model, snella.Frozen)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(
            lambda model: jnp.mean((model(x) - x[:, :3]) ** 2)
        )(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    budgets, report = snella.reallocate(
        nnx.state(model, snella.Budget), optimizer.opt_state, total=40
    )
    nnx.update(model, budgets)
    assert report.steps_since == 20 and report.budgets.sum() == 40
    moved = sum(int(jnp.count_nonzero(w.delta())) for w in weights_of(model))
    assert moved == 40
    chex_equal(frozen, nnx.state(model, snella.Frozen))
    assert type(snella.merge(model).fc1) is nnx.Linear


def chex_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_configs_are_equal_and_hash_by_value():
    make = functools.partial(snella.SnellaConfig, overrides={"fc1": {"rank": 2}})
    assert make() == make() and hash(make()) == hash(make())
    assert make() != make(rank=4)


def test_frozen_weights_in_another_dtype():
    """Frozen weights are cast, trainable ones are not."""
    model = net(frozen_dtype=jnp.bfloat16)
    _, trainable, _, frozen = snella.partition(model)
    assert {v.dtype for v in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
    assert {v.dtype for v in jax.tree.leaves(trainable)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(model, jnp.ones((2, 6))).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_an_abstract_model_is_adapted_before_its_weights_exist(dtype):
    """The factors of the model with weights; weights come in their kept dtype."""
    config = snella.SnellaConfig(
        rank=RANK, targets="fc.", trainable="head", frozen_dtype=dtype
    )
    skeleton = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    model = snella.adapt(skeleton, config, rngs=nnx.Rngs(1))
    expected = snella.adapt(Net(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    for variable in (model.fc1.kernel, model.head.kernel):
        assert isinstance(variable.get_value(), jax.ShapeDtypeStruct)
    assert model.fc1.kernel.dtype == expected.fc1.kernel.dtype
    factors = nnx.state(model, snella.Factor), nnx.state(expected, snella.Factor)
    nnx.update(model, nnx.state(expected, (snella.Frozen, nnx.Param)))
    states = nnx.state(model), nnx.state(expected)
    for pair in (factors, states):
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), *pair))


def test_without_a_gate_every_weight_moves_and_nothing_is_searched():
    """KLoRA: the numbers of a full budget with the hard gate, and no loop."""
    dense = net(gate="none", target_density=1.0)
    hard = net(gate="hard", target_density=1.0)
    x = jnp.linspace(-1, 1, 12).reshape(2, 6)
    np.testing.assert_allclose(called(dense, x), called(hard, x), rtol=1e-6)

    def code(model):
        graphdef, state = nnx.split(model)
        return str(jax.make_jaxpr(lambda s: nnx.merge(graphdef, s)(x))(state))

    assert "scan" in code(hard) and "scan" not in code(dense)
    with pytest.raises(ValueError, match="gate='none' lets every weight move"):
        snella.SnellaConfig(gate="none", target_density=0.3)


def test_a_frozen_dtype_is_a_floating_one():
    with pytest.raises(ValueError, match="expected a floating-point dtype"):
        snella.SnellaConfig(frozen_dtype=jnp.int8)


def test_a_call_does_not_keep_the_model_alive():
    """Nothing remembers the operation, and with it the weights."""
    model = net()
    model(jnp.ones((2, 6)))
    alive = weakref.ref(model.fc1)
    del model
    gc.collect()
    assert alive() is None
