"""The Linen binding, on a ViT as big_vision writes it, and against the NNX binding."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import called
from flax.traverse_util import flatten_dict, unflatten_dict

import snella_jax as snella
from snella_jax import linen, pytree
from snella_jax.models import vit

DEPTH, WIDTH, HEADS = 2, 12, 3
# Of queries, keys and values, which are laid out alike, the values.
TARGETS = r"Transformer/encoderblock.*/(value|out|Dense_\d)"
IMAGES = jax.random.normal(jax.random.key(7), (4, 8, 8, 3))
LABELS = jnp.array([0, 1, 2, 1])
INTO = snella.Layout((12,), (3, 4))
OUT = snella.Layout((3, 4), (12,))
UP, DOWN = snella.Layout((12,), (48,)), snella.Layout((48,), (12,))


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(4 * WIDTH)(x), approximate=False)
        return nn.Dense(WIDTH)(y)


class Encoder1DBlock(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(num_heads=HEADS)(y, y)
        x = x + nn.Dropout(0.2)(y, deterministic)
        return x + MlpBlock()(nn.LayerNorm()(x)), None


class Encoder(nn.Module):
    scan: bool
    remat: bool

    @nn.compact
    def __call__(self, x, deterministic):
        block = Encoder1DBlock
        if self.remat:
            block = nn.remat(block, prevent_cse=not self.scan, static_argnums=(2,))
        if self.scan:
            x, _ = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=DEPTH,
            )(name="encoderblock")(x, deterministic)
        else:
            for index in range(DEPTH):
                x, _ = block(name=f"encoderblock_{index}")(x, deterministic)
        return nn.LayerNorm(name="encoder_norm")(x)


class LinenViT(nn.Module):
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(WIDTH, (4, 4), strides=(4, 4), padding="VALID", name="embedding")(
            images
        )
        x = x.reshape(len(x), -1, WIDTH)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], 1)
        x = x + self.param("pos", nn.initializers.normal(0.02), (1, 5, WIDTH))
        x = Encoder(self.scan, self.remat, name="Transformer")(x, not train)
        return nn.Dense(3, name="head")(x[:, 0])


def config(**changes):
    settings = {
        "rank": 4,
        "targets": TARGETS,
        "trainable": "head|cls",
        "allocation": "fixed",
    }
    return snella.SnellaConfig(**(settings | changes))


@functools.cache
def variables(scan=False):
    """The same numbers, stacked or not, with every bias and norm drawn."""
    plain = jax.jit(LinenViT().init)(jax.random.key(0), IMAGES)["params"]
    flat = flatten_dict(plain, sep="/")
    rng = np.random.default_rng(1)
    flat = {
        name: jnp.asarray(leaf + np.float32(0.1 * rng.normal(size=leaf.shape)))
        for name, leaf in flat.items()
    }
    if scan:
        flat = stacked(flat)
    return {"params": unflatten_dict(flat, sep="/")}


def stacked(flat):
    first = "Transformer/encoderblock_0/"
    rest = {k: v for k, v in flat.items() if "/encoderblock_" not in k}
    for name in [name for name in flat if name.startswith(first)]:
        rows = [flat[name.replace("_0/", f"_{i}/", 1)] for i in range(DEPTH)]
        rest[name.replace("encoderblock_0", "encoderblock")] = jnp.stack(rows)
    return rest


def original(flat):
    """The parameters in the names of the original `.npz` files."""
    names = {
        "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
        "LayerNorm_1": "LayerNorm_2",
        "MlpBlock_0": "MlpBlock_3",
        "pos": "Transformer/posembed_input/pos_embedding",
    }
    found = {}
    for name, leaf in flat.items():
        parts = [names.get(part, part) for part in name.split("/")]
        found["/".join(parts)] = np.asarray(leaf)
    return found


def run(applies, params, inputs, **others):
    """Compiled whole, which is much faster than operation by operation."""
    return jax.jit(applies.apply)({"params": params, **others}, inputs)


def loss_of(apply):
    def loss(trainable, budgets, frozen, **options):
        params = linen.join(trainable, budgets, frozen)
        logits = apply({"params": params}, IMAGES, **options)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    return loss


@pytest.fixture(scope="module", params=["unrolled", "scan and remat"])
def adapted(request):
    scan = request.param != "unrolled"
    module = LinenViT(scan=scan, remat="remat" in request.param)
    adapters, params = linen.adapt(
        module, variables(scan), config(), IMAGES, key=jax.random.key(4)
    )
    return module, adapters, params


def test_what_is_adapted(adapted):
    module, adapters, params = adapted
    weights = adapters.weights(params)
    assert sum(int(np.prod(w.site.lead)) for w in weights) == 4 * DEPTH
    by_end = {w.path.split("/")[-1]: w.site for w in weights}
    assert by_end["value"].layout == INTO
    assert by_end["out"].layout == OUT
    assert by_end["Dense_0"].layout == UP
    assert by_end["value"].stack == ((DEPTH,) if module.scan else ())
    trainable, budgets, frozen = map(flatten_dict, adapters.partition(params))
    names = {"/".join(path) for path in trainable}
    assert {"cls", "head/kernel", "head/bias"} < names
    assert all("adapter" in name for name in names if name[:1] == "T")
    assert all(leaf.dtype == jnp.int32 for leaf in budgets.values())
    assert ("Transformer", "encoder_norm", "scale") in frozen
    assert trainable.keys() | budgets.keys() | frozen.keys() == (
        flatten_dict(params).keys()
    )
    chex.assert_trees_all_equal(linen.join(*adapters.partition(params)), params)


def test_outputs_and_gradients_are_those_of_summed_weights(adapted):
    """The oracle: plain parameters with the update added, through the plain module."""
    module, adapters, params = adapted
    parts = adapters.partition(params)
    found = jax.jit(jax.value_and_grad(loss_of(adapters.apply)))(*parts)

    def plain(variables, *args):
        return module.apply({"params": adapters.summed(variables["params"])}, *args)

    expected = jax.jit(jax.value_and_grad(loss_of(plain)))(*parts)
    base = jax.jit(loss_of(module.apply))(variables(module.scan)["params"], {}, {})
    assert abs(found[0] - base) > 1e-3
    chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=2e-6)
    grads = flatten_dict(found[1])
    moved = [path for path, leaf in grads.items() if np.abs(leaf).max() > 0]
    assert len(moved) == len(grads)


def test_scanned_and_unrolled_adapters_compute_the_same(adapted):
    """The same numbers, in a scan without remat."""
    _, adapters, params = adapted
    flat = flatten_dict(params, sep="/")
    if "Transformer/encoderblock/MlpBlock_0/Dense_0/kernel" not in flat:
        flat = stacked(flat)
    module = LinenViT(scan=True)
    other, fresh = linen.adapt(
        module, variables(True), config(), IMAGES, key=jax.random.key(5)
    )
    tree = unflatten_dict(flat, sep="/")
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, fresh)
    np.testing.assert_allclose(
        run(other, tree, IMAGES),
        run(adapters, params, IMAGES),
        atol=1e-5,
    )


def test_merged_and_unloaded(adapted):
    module, adapters, params = adapted
    merged = adapters.merge(params)
    chex.assert_trees_all_equal_shapes(merged, variables(module.scan)["params"])
    np.testing.assert_allclose(
        run(module, merged, IMAGES),
        run(adapters, params, IMAGES),
        atol=1e-5,
    )
    chex.assert_trees_all_equal(
        adapters.unload(params), variables(module.scan)["params"]
    )
    never, unmoved = linen.adapt(
        module,
        variables(module.scan),
        config(allocation="adaptive"),
        IMAGES,
        key=jax.random.key(2),
    )
    with pytest.raises(snella.BudgetsNeverMoved):
        never.merge(unmoved)
    never.merge(unmoved, unmoved_budgets=True)


def train(adapters, params, steps=10):
    """A whole training, with budgets that move and no step compiled twice."""
    trainable, budgets, frozen = adapters.partition(params)
    tx = optax.chain(
        snella.track_importance(), optax.adamw(1e-2, mask=snella.decay_mask)
    )
    state = tx.init(trainable)
    loss = loss_of(adapters.apply)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(trainable, state, budgets, key):
        value, grads = jax.value_and_grad(loss)(
            trainable, budgets, frozen, train=True, rngs={"dropout": key}
        )
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    evaluated = jax.jit(loss)
    before = float(evaluated(trainable, budgets, frozen))
    for index in range(steps):
        if index == steps // 2:
            budgets, report = snella.reallocate(budgets, state, 500)
            assert report.budgets.sum() == 500
        trainable, state, _ = step(trainable, state, budgets, jax.random.key(index))
    assert float(evaluated(trainable, budgets, frozen)) < 0.9 * before
    return linen.join(trainable, budgets, frozen)


@pytest.fixture(scope="module")
def trained(adapted):
    module, _, _ = adapted
    adapters, params = linen.adapt(
        module,
        variables(module.scan),
        config(allocation="adaptive"),
        IMAGES,
        key=jax.random.key(2),
    )
    return module, adapters, train(adapters, params)


NAMES = {
    r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_0/(.*)":
        r"blocks/attn/\2[\1]",
    r"Transformer/encoderblock_(\d+)/MlpBlock_0/Dense_0": r"blocks/mlp/fc1[\1]",
    r"Transformer/encoderblock_(\d+)/MlpBlock_0/Dense_1": r"blocks/mlp/fc2[\1]",
    r"Transformer/encoderblock/MultiHeadDotProductAttention_0/(.*)(\[\d+\])":
        r"blocks/attn/\1\2",
    r"Transformer/encoderblock/MlpBlock_0/Dense_0(.*)": r"blocks/mlp/fc1\1",
    r"Transformer/encoderblock/MlpBlock_0/Dense_1(.*)": r"blocks/mlp/fc2\1",
    "cls": "cls_token",
}  # fmt: skip


def test_an_adapter_trained_in_linen_goes_to_nnx_and_back(trained, tmp_path):
    module, adapters, params = trained
    adapters.save(params, tmp_path / "linen", base="big_vision")
    np.savez(
        tmp_path / "base.npz", **original(flatten_dict(variables()["params"], sep="/"))
    )
    base = vit.load(tmp_path / "base.npz", heads=HEADS)
    expected = run(adapters, params, IMAGES)
    model = snella.load(base, tmp_path / "linen", rename=NAMES)
    np.testing.assert_allclose(called(model, IMAGES), expected, atol=1e-5)
    assert np.abs(np.asarray(called(base, IMAGES) - expected)).max() > 1e-2
    np.testing.assert_allclose(
        called(snella.merge(model), IMAGES),
        run(module, adapters.merge(params), IMAGES),
        atol=1e-5,
    )
    snella.save(model, tmp_path / "nnx")
    where = (
        r"Transformer/encoderblock\2" if module.scan else r"Transformer/encoderblock_\2"
    )
    back = {
        r"blocks/attn/(.*)\[(\d+)\]": where + r"/MultiHeadDotProductAttention_0/\1",
        r"blocks/mlp/fc1()\[(\d+)\]": where + r"/MlpBlock_0/Dense_0",
        r"blocks/mlp/fc2()\[(\d+)\]": where + r"/MlpBlock_0/Dense_1",
        "cls_token": "cls",
    }
    if module.scan:
        back = {k: v.replace(r"block\2", "block") + r"[\2]" if "blocks" in k else v
                for k, v in back.items()}  # fmt: skip
    again, loaded = linen.load(
        module, variables(module.scan), tmp_path / "nnx", IMAGES, rename=back
    )
    chex.assert_trees_all_equal(loaded["params"], params)
    found = run(again, loaded["params"], IMAGES)
    np.testing.assert_array_equal(found, expected)


def test_files_of_linen_are_read_by_linen_and_by_no_framework(trained, tmp_path):
    module, adapters, params = trained
    adapters.save(params, tmp_path / "a")
    own = variables(module.scan)
    again, loaded = linen.load(module, own, tmp_path / "a", IMAGES)
    chex.assert_trees_all_equal(loaded["params"], params)
    for one, other in zip(
        again.partition(params), adapters.partition(params), strict=True
    ):
        chex.assert_trees_all_equal(one, other)
    layouts = {
        ".*/(query|key|value)": INTO,
        ".*/out": OUT,
        r".*/Dense_0": UP,
        r".*/Dense_1": DOWN,
    }
    plain, tree = pytree.load(own["params"], tmp_path / "a", layouts=layouts)
    chex.assert_trees_all_equal(tree, params)
    np.testing.assert_allclose(
        run(module, plain.summed(tree), IMAGES),
        run(adapters, params, IMAGES),
        atol=1e-5,
    )
    path = tmp_path / "delta.safetensors"
    flat = [flatten_dict(t, sep="/") for t in (own["params"], adapters.merge(params))]
    snella.save_delta(path, *flat)
    found = snella.apply_delta(flat[0], path)
    for name, leaf in flat[1].items():
        np.testing.assert_array_equal(found[name], leaf)
    for name, leaf in snella.unmerge(found, path).items():
        np.testing.assert_array_equal(leaf, flat[0][name])


def test_another_module_is_refused(trained, tmp_path):
    module, adapters, params = trained
    adapters.save(params, tmp_path / "a")
    other = LinenViT(scan=not module.scan)
    with pytest.raises(snella.CheckpointError, match="no such layer that can be"):
        linen.load(other, variables(other.scan), tmp_path / "a", IMAGES)
    changed = jax.tree.map(lambda x: x + 1e-3, variables(module.scan))
    with pytest.raises(snella.CheckpointError, match="fingerprint differs"):
        linen.load(module, changed, tmp_path / "a", IMAGES)
