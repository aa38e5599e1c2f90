"""Sketching adapters of Linen modules: a key beside the factors, scanned or not."""

import collections
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import snella_jax as snella
from snella_jax import linen, pytree

KEY = jax.random.key(3)
DEPTH, WIDTH, HEADS, BATCH, ROWS = 2, 12, 3, 4, 8
X = jax.random.normal(jax.random.key(7), (BATCH, ROWS, WIDTH))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(y, y)
        return nn.tanh(nn.Dense(WIDTH, name="fc")(x)), None


class Net(nn.Module):
    scan: bool = True
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        if self.scan:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            block = nn.scan(block, in_axes=nn.broadcast, length=DEPTH, **axes)
            return block(name="block")(x, None)[0]
        for index in range(DEPTH):
            x, _ = block(name=f"block_{index}")(x, None)
        return x


def adapted(sketch=4, of="query|key|value|out|fc", **options):
    net = Net(**options)
    targets = rf"block.*/({of})"
    config = snella.SnellaConfig(rank=4, targets=targets, trainable="", sketch=sketch)
    variables = net.init(jax.random.key(0), X)
    adapters, params = linen.adapt(net, variables, config, X, key=jax.random.key(1))
    trainable, *rest = adapters.partition(params)

    def loss(trainable, key):
        params = linen.join(trainable, *rest)
        params = params if key is None else adapters.seed(params, key)
        return (adapters.apply({"params": params}, X) ** 2).sum()

    return adapters, params, trainable, loss


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_layers_that_read_one_array_keep_one_sketch(scan):
    """A block keeps two rows of eight of the queries' input, of out's and of fc's."""
    *_, trainable, loss = adapted(scan=scan)
    _, back = jax.vjp(lambda t: loss(t, KEY), trainable)
    shapes = [leaf.shape for leaf in jax.tree.leaves(back) if hasattr(leaf, "shape")]
    kept = collections.Counter(
        shape[shape.index(2, 1) + 1 :]
        for shape in shapes
        if (BATCH, 2) in itertools.pairwise(shape)
    )
    blocks = 1 if scan else DEPTH
    assert kept == {(WIDTH,): 2 * blocks, (HEADS, WIDTH // HEADS): blocks}


def test_keys_of_steps_and_blocks():
    """Rematerialised the same, of another key other gradients, without one exact."""
    own = "query|key|fc"  # two that share a sketch, and one alone
    *_, trainable, loss = adapted(of=own)
    again = adapted(of=own, remat=True)[-1]
    gradient = jax.jit(jax.grad(loss))
    got, other, exact = (
        gradient(trainable, key) for key in (KEY, jax.random.key(4), None)
    )
    remade = jax.jit(jax.grad(again))(trainable, KEY)
    chex.assert_trees_all_close(remade, got, rtol=1e-3, atol=1e-4)
    for draw in (other, exact):
        apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), got, draw)
        assert apart["block"]["fc"]["adapter"]["a"] > 1e-3
    plain = adapted(sketch=1, of=own)[-1]
    programs = [jax.make_jaxpr(run)(trainable, None) for run in (loss, plain)]
    assert str(programs[0]) == str(programs[1])


def test_keys_train_nothing_and_end_up_in_no_file(tmp_path):
    adapters, params, *_ = adapted()
    seeded = adapters.seed(params, KEY)
    new = flatten_dict(seeded).keys() - flatten_dict(params).keys()
    assert {path[-1] for path in new} == {"key"} and len(new) == 5
    keys = seeded["block"]["fc"]["adapter"]["key"]
    assert keys.shape == (DEPTH,) and (keys[0] != keys[1]).all()
    trainable, budgets, frozen = adapters.partition(seeded)
    assert new <= flatten_dict(frozen).keys()
    for same, part in zip(
        adapters.partition(params)[:2], (trainable, budgets), strict=True
    ):
        chex.assert_trees_all_equal(part, same)
    for own, folder in ((seeded, "seeded"), (params, "plain")):
        adapters.save(own, tmp_path / folder)
    files = [
        tmp_path / folder / "adapter_config.json" for folder in ("seeded", "plain")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    merged = [adapters.merge(own, unmoved_budgets=True) for own in (seeded, params)]
    chex.assert_trees_all_equal(*merged)
    with pytest.raises(ValueError, match="no adapter of block/"):
        adapters.seed(frozen, KEY)
    with pytest.raises(TypeError, match="no random key"):
        adapters.seed(params, 0)


class One(nn.Module):
    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv(4, (3,)),
        nn.Einsum((WIDTH, 4), "btn,nm->btm"),
        nn.DenseGeneral(4, axis=(1,)),
        nn.DenseGeneral(4, axis=-1, batch_dims=(0,)),
        nn.Dense(4, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k)),
    ],
)
def test_layers_that_need_not_multiply_rows_are_refused(layer):
    net = One(layer)
    variables = net.init(jax.random.key(0), X)
    config = snella.SnellaConfig(rank=4, targets="layer", trainable="", sketch=4)
    with pytest.raises(ValueError, match=r"layer cannot be .*sketch=4 .*overrides"):
        linen.adapt(net, variables, config, X, key=KEY)


def test_a_tree_without_layers_is_refused():
    params = {"fc": {"kernel": np.ones((6, 8), np.float32)}}
    config = snella.SnellaConfig(rank=4, targets="fc", trainable="", sketch=4)
    with pytest.raises(ValueError, match="fc: sketch=4 needs a layer"):
        pytree.adapt(params, config, key=KEY)
