"""SAM's ViT encoder against slow NumPy and against transformers; its memory."""

import dataclasses
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sam_oracle
from compiled import called
from flax import nnx
from gpus import device
from jax.extend.core import jaxprs_in_params
from tiny import leaves

from snella_jax import models
from snella_jax.models.checkpoints.mapping import stored
from snella_jax.models.layers import attention
from snella_jax.models.sam import relative
from snella_jax.models.sam.vit_encoder import ViTEncoder, ViTEncoderConfig

# Windows of 3 on a grid of 5 x 4: both axes are padded.
TINY = ViTEncoderConfig(
    8, depth=3, heads=2, global_blocks=(1,), mlp_dim=12, window=3, out_channels=6,
    patch_size=2, image_size=(10, 8),
)  # fmt: skip
IMAGES = np.random.default_rng(0).normal(size=(2, 10, 8, 3)).astype(np.float32)


def drawn(config):
    """An encoder with random numbers everywhere, also where the initial ones are 0."""
    encoder = ViTEncoder(config, rngs=nnx.Rngs(0))
    for path, value in nnx.to_flat_state(nnx.state(encoder)):
        rng = np.random.default_rng(zlib.crc32("/".join(map(str, path)).encode()))
        noise = 0.4 * rng.normal(size=value.shape) + (path[-1] == "scale")
        value.set_value(jnp.asarray(noise, value.dtype))
    return encoder


def close(got, expected, share=1e-5):
    got, expected = np.float32(got), np.float32(expected)
    atol = share * abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("depth", "whole"), [(3, (1,)), (4, (1, 3)), (3, (0, 1)), (2, ())]
)
def test_is_the_formula(depth, whole):
    """Blocks in any order; padded windows, whose padding is attended to."""
    config = dataclasses.replace(TINY, depth=depth, global_blocks=whole)
    encoder = drawn(config)
    listed = models.unstack(encoder)
    assert not listed.config.stacked and encoder.config.stacked
    expected = sam_oracle.encoded(leaves(listed), IMAGES, config)
    assert expected.shape == (2, 5, 4, 6)
    close(called(encoder, IMAGES), expected)
    if depth == 4:
        close(called(listed, IMAGES), expected)


# Attention with relative positions


def draw(grid=(5, 4), dtype=jnp.float32, batch=2, heads=3, head_dim=8):
    keys = jax.random.split(jax.random.key(3), 5)
    shape = batch, *grid, heads, head_dim
    q, k, v = (jax.random.normal(key, shape).astype(dtype) for key in keys[:3])
    sizes = [(2 * side - 1, head_dim) for side in grid]
    return (
        q,
        k,
        v,
        *(
            jax.random.normal(key, size).astype(dtype)
            for key, size in zip(keys[3:], sizes, strict=True)
        ),
    )


def naive(q, k, v, rows, columns):
    """With the whole bias as one array."""
    height, width = q.shape[1:3]
    y, x = (np.arange(side) for side in (height, width))
    of_rows = rows[y[:, None] - y + height - 1]
    of_columns = columns[x[:, None] - x + width - 1]
    bias = jnp.einsum("byxhd,yid->bhyxi", q, of_rows)[..., None]
    bias += jnp.einsum("byxhd,xjd->bhyxj", q, of_columns)[..., None, :]
    logits = jnp.einsum("byxhd,bijhd->bhyxij", q, k) / np.sqrt(q.shape[-1]) + bias
    shares = jax.nn.softmax(logits.reshape(*logits.shape[:4], -1))
    return jnp.einsum("bhyxij,bijhd->byxhd", shares.reshape(logits.shape), v)


def fused(q, k, v, rows, columns):
    """As a fused implementation computes it, by XLA."""
    longer = relative.extended(q, k, v, *map(relative.by_place, (rows, columns)))
    widths = {x.shape[-1] for x in longer}
    assert widths == {relative.extended_width(q.shape[-1], q.shape[1:3])} == {24}
    y = attention.attend(*longer, "xla", scale=q.shape[-1] ** -0.5)
    return y[..., : q.shape[-1]].reshape(q.shape)


def with_gradients(function, arrays):
    def loss(*arrays):
        y = function(*arrays)
        return jnp.sin(y.astype(jnp.float32)).sum(), y

    how = jax.value_and_grad(loss, range(5), has_aux=True)
    (_, y), gradients = jax.jit(how)(*arrays)
    return y, *gradients


# 512: all queries at once. 11: two rows of the grid of 5 x 4, and one of zeros at last.
@pytest.mark.parametrize(
    ("route", "queries"), [(relative.attend, 512), (relative.attend, 11), (fused, 512)]
)
def test_every_route_is_the_formula(route, queries, monkeypatch):
    """Values against the slow oracle, gradients against the naive formula."""
    monkeypatch.setattr(relative, "QUERIES", queries)
    arrays = draw()
    expected = with_gradients(naive, arrays)
    slow = [
        sam_oracle.biased(*own, *arrays[3:]) for own in zip(*arrays[:3], strict=True)
    ]
    got = with_gradients(route, arrays)
    for one, other in zip((*got, got[0]), (*expected, np.stack(slow)), strict=True):
        close(one, other, 3e-6)


@pytest.mark.parametrize(("old", "new"), [(127, 31), (7, 9), (9, 9)])
def test_a_table_of_another_length(old, new):
    table = np.random.default_rng(1).normal(size=(old, 4)).astype(np.float32)
    expected = jax.image.resize(table, (new, 4), "linear", antialias=False)
    close(relative.resized_table(table, new), expected, 3e-5)


@pytest.mark.parametrize(
    ("where", "dtype", "grid", "expected"),
    [
        (device(), jnp.bfloat16, (64, 64), "cudnn"),
        (device(), jnp.bfloat16, (14, 14), "cudnn"),
        (device(capability="8.0"), jnp.bfloat16, (14, 14), "cudnn"),
        (device(capability="8.0"), jnp.bfloat16, (64, 64), "xla"),  # 192 channels
        (device(), jnp.float32, (14, 14), "xla"),
    ],
)
def test_auto(where, dtype, grid, expected, monkeypatch):
    """The channels for the bias count, and the bias goes where it can."""
    asked = []

    def attended(q, k, v, bias=None, *_, implementation, scale=None, **__):
        asked.append((implementation, q.shape[-1], bias is None, scale))
        return q

    monkeypatch.setattr(jax, "local_devices", lambda: [where])
    monkeypatch.setattr(jax.nn, "dot_product_attention", attended)
    arrays = draw(grid, dtype, 1, 1, 64)
    jax.eval_shape(lambda: relative.attend(*arrays))
    width = 64 + 2 * grid[0] if grid[0] == 64 else 96
    how = (
        ("cudnn", width, True, 1 / 8)
        if expected == "cudnn"
        else ("xla", 64, False, None)
    )
    assert {*asked} == {how}


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [(14, 14), (64, 64), (40, 30)])
def test_cudnn_computes_what_xla_does(grid):
    """Values and gradients within bfloat16's rounding; a whole grid needs a Hopper."""
    arrays = draw(grid, jnp.bfloat16, 2, 12, 64)

    def by(implementation):
        return with_gradients(
            lambda *arrays: relative.attend(*arrays, implementation), arrays
        )

    for got, expected in zip(by("cudnn"), by("xla"), strict=True):
        close(got, expected, 2e-2)


# Memory


def sizes(jaxpr):
    """Numbers of elements of every array in a program, in those it calls too."""
    for equation in jaxpr.eqns:
        yield from (x.aval.size for x in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


@pytest.mark.parametrize(("queries", "chunk"), [(32, 2 * 32 * 256), (256, 2 * 256**2)])
def test_arrays_of_pairs_of_tokens(queries, chunk, monkeypatch):
    """None is kept for the backward pass, and none in a step is more than a chunk's."""
    monkeypatch.setattr(relative, "QUERIES", queries)
    config = dataclasses.replace(TINY, image_size=32)  # 256 tokens, 2 heads
    graphdef, state = nnx.split(ViTEncoder(config, rngs=nnx.Rngs(0)))

    def loss(state):
        return nnx.merge(graphdef, state)(jnp.zeros((1, 32, 32, 3))).sum()

    kept = jax.eval_shape(lambda: jax.vjp(loss, state)[1])
    assert max(leaf.size for leaf in jax.tree.leaves(kept)) < 256**2 / 8
    assert max(sizes(jax.make_jaxpr(jax.grad(loss))(state).jaxpr)) == chunk


def test_recomputed_blocks_compute_the_same():
    config = dataclasses.replace(TINY, depth=2)
    state = nnx.state(drawn(config))

    def run(remat):
        own = dataclasses.replace(config, remat=remat)
        graphdef = nnx.graphdef(
            nnx.eval_shape(lambda: ViTEncoder(own, rngs=nnx.Rngs(0)))
        )

        def loss(state):
            return jnp.sin(nnx.merge(graphdef, state)(IMAGES)).sum()

        kept = jax.eval_shape(lambda: jax.vjp(loss, state)[1])
        numbers = sum(leaf.size for leaf in jax.tree.leaves(kept))
        return jax.tree.leaves(jax.jit(jax.grad(loss))(state)), numbers

    (plain, all_kept), (again, kept) = run("none"), run("blocks")
    assert kept < all_kept - 2 * IMAGES[..., 0].size * 12  # no hidden layer, for one
    for got, expected in zip(again, plain, strict=True):
        close(got, expected, 1e-5)


def test_numbers_of_16_bits():
    encoder = drawn(TINY)
    config = dataclasses.replace(TINY, dtype=jnp.bfloat16)
    graphdef = nnx.graphdef(
        nnx.eval_shape(lambda: ViTEncoder(config, rngs=nnx.Rngs(0)))
    )
    half = called(nnx.merge(graphdef, nnx.state(encoder)), IMAGES)
    assert half.dtype == jnp.bfloat16
    close(half, called(encoder, IMAGES), 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "heads=3 does not divide width=8"),
        ({"global_blocks": (3,)}, "expected indices of the 3 blocks, ascending"),
        ({"global_blocks": (2, 1)}, "expected indices of the 3 blocks, ascending"),
        ({"image_size": 9}, "image_size=9 is not a multiple of patch_size=2"),
        ({"window": 0}, "window=0: expected at least 1"),
        ({"attention": "flash"}, "attention='flash': expected auto, xla, cudnn"),
        ({"remat": "all"}, 'expected "none" or "blocks"'),
    ],
)
def test_a_config_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(TINY, **changes)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"this model takes \[B, 10, 8, 3\]"):
        drawn(TINY)(IMAGES[:, :8])


# Against transformers


@pytest.mark.reference
@pytest.mark.parametrize("whole", [[1], [0, 2]])
def test_is_that_of_transformers(whole):
    torch = pytest.importorskip("torch")
    from transformers import SamVisionConfig, SamVisionModel

    config = SamVisionConfig(
        hidden_size=32, output_channels=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=80, patch_size=16, window_size=3, global_attn_indexes=whole,
        mlp_dim=64, num_pos_feats=16,
    )  # fmt: skip
    reference = SamVisionModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, value in reference.named_parameters():
        noise = 0.3 * torch.randn(value.shape, generator=generator)
        value.data = noise + ("norm" in name and name.endswith("weight"))
    own = ViTEncoderConfig(
        32, 3, 2, tuple(whole), 64, 3, out_channels=32, image_size=80, stacked=False
    )
    encoder = ViTEncoder(own, rngs=nnx.Rngs(0))
    fill(encoder, reference.state_dict())
    pixels = np.random.default_rng(2).normal(size=(2, 80, 80, 3)).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.tensor(pixels.transpose(0, 3, 1, 2)))[0].numpy()
    close(called(encoder, pixels), expected.transpose(0, 2, 3, 1))


def fill(encoder, tensors):
    """Gives an encoder, whose blocks are lists, the tensors of a `SamVisionModel`."""
    places = {f"{k}/{row}": i for i, (k, row) in enumerate(encoder.config.places)}
    for path, variable in stored(encoder).items():
        name = re.sub(r"blocks/(\w+/\d+)", lambda m: f"layers/{places[m[1]]}", path)
        name = name.replace("norm", "layer_norm").replace("mlp/fc", "mlp/lin")
        name = name.replace("patch_embed", "patch_embed/projection")
        name = re.sub(
            r"/(kernel|scale)$", "/weight", re.sub("attn/[qkv]/", "attn/qkv/", name)
        )
        value = tensors[f"vision_encoder/{name}".replace("/", ".")].numpy()
        if third := re.search("attn/([qkv])/", path):
            value = np.split(value, 3)["qkv".index(third[1])]
        if path.endswith("kernel"):
            value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
        assert variable.shape == value.shape
        variable.set_value(jnp.asarray(value))
