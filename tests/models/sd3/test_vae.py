"""The autoencoder of Stable Diffusion 3 against the formulas in NumPy."""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snella_jax.models.sd3 import vae
from snella_jax.models.sd3.vae.model import LOGVAR, Attention, Down, Up

TINY = vae.VAEConfig(widths=(4, 8), blocks=1, groups=2, latents=3)


def redrawn(model):
    """The model with weights large enough to matter, its norms' too."""
    for path, weight in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        key = zlib.crc32("/".join(map(str, path)).encode())
        noise = np.random.default_rng(key).normal(0, 0.3, weight.shape)
        weight.set_value(jnp.asarray(noise + ("scale" in path), weight.dtype))
    return model


def made(**changes):
    config = dataclasses.replace(TINY, **changes)
    return redrawn(nnx.eval_shape(lambda: vae.VAE(config, rngs=nnx.Rngs(0))))


def close(got, expected):
    got = np.asarray(got)
    assert got.shape == expected.shape
    assert abs(got - expected).max() <= 1e-5 * abs(expected).max()


class Oracle:
    """A model's layers in float64, by paths; `[h, w, D]` of one image."""

    def __init__(self, model):
        state = nnx.to_flat_state(nnx.state(model, nnx.Param))
        self.weights = {"/".join(map(str, p)): np.float64(v[...]) for p, v in state}
        self.config = model.config

    def conv(self, x, path, stride=1, before=1):
        """Convolution, summed over the places of its kernel."""
        kernel, bias = (self.weights[f"{path}/{name}"] for name in ("kernel", "bias"))
        if kernel.ndim == 2 or kernel.shape[0] == 1:
            return x @ kernel.reshape(kernel.shape[-2:]) + bias
        x = np.pad(x, ((before, 1), (before, 1), (0, 0)))
        height, width = ((side - 3) // stride + 1 for side in x.shape[:2])
        y = np.zeros((height, width, len(bias))) + bias
        for i, row in enumerate(kernel):
            for j, matrix in enumerate(row):
                part = x[i : i + stride * height : stride]
                y += part[:, j : j + stride * width : stride] @ matrix
        return y

    def norm(self, x, path):
        """Group norm: every group's channels over the whole grid."""
        scale, bias = (self.weights[f"{path}/{name}"] for name in ("scale", "bias"))
        groups = x.reshape(-1, self.config.groups, x.shape[-1] // self.config.groups)
        mean = groups.mean((0, 2), keepdims=True)
        root = np.sqrt(groups.var((0, 2), keepdims=True) + self.config.norm_eps)
        return ((groups - mean) / root).reshape(x.shape) * scale + bias

    def block(self, x, path):
        y = x
        for index in (1, 2):
            y = silu(self.norm(y, f"{path}/norm{index}"))
            y = self.conv(y, f"{path}/conv{index}")
        beside = f"{path}/shortcut"
        own = f"{beside}/kernel" in self.weights
        return y + (self.conv(x, beside) if own else x)

    def attention(self, x, path):
        y = self.norm(x, f"{path}/norm").reshape(-1, x.shape[-1])
        q, k, v = (self.conv(y, f"{path}/{name}") for name in "qkv")
        scores = q @ k.T / math.sqrt(x.shape[-1])
        share = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = share / share.sum(-1, keepdims=True) @ v
        return x + self.conv(mixed, f"{path}/proj").reshape(x.shape)

    def middle(self, x, path):
        x = self.attention(self.block(x, f"{path}/0"), f"{path}/1")
        return self.block(x, f"{path}/2")

    def ended(self, x, half):
        return self.conv(silu(self.norm(x, f"{half}/norm")), f"{half}/conv_out")

    def encode(self, image):
        x = self.conv(image, "encoder/conv_in")
        x = self.block(x, "encoder/levels/0/blocks/0")
        x = self.conv(x, "encoder/down/0/conv", stride=2, before=0)
        x = self.block(x, "encoder/levels/1/blocks/0")
        return self.ended(self.middle(x, "encoder/middle"), "encoder")

    def decode(self, latents):
        x = self.middle(self.conv(latents, "decoder/conv_in"), "decoder/middle")
        for index in (0, 1):
            x = self.block(x, f"decoder/levels/1/blocks/{index}")
        x = self.conv(np.kron(x, np.ones((2, 2, 1))), "decoder/up/0/conv")
        for index in (0, 1):
            x = self.block(x, f"decoder/levels/0/blocks/{index}")
        return self.ended(x, "decoder")


def silu(x):
    return x / (1 + np.exp(-x))


def test_it_is_the_formulas_in_numpy():
    """The larger side is odd: the last column has no place in the latents."""
    model = made()
    oracle = Oracle(model)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 6, 9, 3)).astype("f4")
    encode = nnx.jit(lambda model, x: model.encode(x))
    mean, logvar = encode(model, images)
    moments = np.stack([oracle.encode(np.float64(image)) for image in images])
    assert moments.shape == (2, 3, 4, 6) and abs(moments).max() < 20
    close(mean, moments[..., :3])
    close(logvar, moments[..., 3:])
    decoded = nnx.jit(lambda model, z: model.decode(z))(model, mean)
    close(decoded, np.stack([oracle.decode(np.float64(z)) for z in np.asarray(mean)]))
    assert mean.dtype == logvar.dtype == decoded.dtype == jnp.float32
    for number, clipped in ((1e4, LOGVAR[1]), (-1e4, LOGVAR[0])):
        model.encoder.conv_out.bias.set_value(jnp.full(6, number))
        mean, logvar = encode(model, images)
        assert abs(mean - number).max() < 100 and (logvar == clipped).all()


def test_going_down_pads_right_and_bottom_only():
    """Sums over windows of 3 x 3, every second one from the first place."""
    down = nnx.eval_shape(lambda: Down(1, one_channel(), rngs=nnx.Rngs(0)))
    down.conv.kernel.set_value(jnp.ones((3, 3, 1, 1)))
    down.conv.bias.set_value(jnp.zeros(1))
    grid = np.arange(16.0, dtype="f4").reshape(1, 4, 4, 1)
    expected = [[0 + 1 + 2 + 4 + 5 + 6 + 8 + 9 + 10, 2 + 3 + 6 + 7 + 10 + 11]]
    expected += [[8 + 9 + 10 + 12 + 13 + 14, 10 + 11 + 14 + 15]]
    assert down(grid)[0, ..., 0].tolist() == expected


def test_going_up_repeats_every_place():
    up = nnx.eval_shape(lambda: Up(1, one_channel(), rngs=nnx.Rngs(0)))
    middle = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)  # the place itself
    up.conv.kernel.set_value(middle)
    up.conv.bias.set_value(jnp.zeros(1))
    grid = np.float32([[1, 2], [3, 4]]).reshape(1, 2, 2, 1)
    expected = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert up(grid)[0, ..., 0].tolist() == expected


def one_channel():
    return dataclasses.replace(TINY, widths=(1,), groups=1)


def kept(function, *arguments):
    """Numbers that the backward pass of a function keeps, as arrays."""
    vjp = jax.eval_shape(
        lambda *arguments: jax.vjp(function, *arguments)[1], *arguments
    )
    return [math.prod(leaf.shape) for leaf in jax.tree.leaves(vjp)]


def test_recomputed_blocks_keep_less_for_the_backward_pass():
    images = jnp.zeros((1, 32, 32, 3))

    def beside_weights(remat):
        graphdef, state = nnx.split(made(remat=remat))
        weights = sum(leaf.size for leaf in jax.tree.leaves(state))

        def encode(state, x):
            return nnx.merge(graphdef, state).encode(x)

        return sum(kept(encode, state, images)) - weights

    assert beside_weights("blocks") < 0.4 * beside_weights("none")


def test_sizes_of_stable_diffusion_3():
    model = nnx.eval_shape(lambda: vae.VAE(vae.PRESETS["sd3"], rngs=nnx.Rngs(0)))
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert len(shapes) == 244 and sum(map(math.prod, shapes)) == 83_819_683
    assert (model.scale, model.shift, model.factor) == (1.5305, 0.0609, 8)


def test_attention_keeps_no_square_for_the_backward_pass():
    """At 512 pixels, `[T, T]` would be 64 MB an image."""
    config = dataclasses.replace(TINY, widths=(4,), groups=2)
    layer = nnx.eval_shape(lambda: Attention(4, config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(layer)
    shape = 1, 16, 16, 4
    sizes = kept(lambda s, x: nnx.merge(graphdef, s)(x), state, jnp.zeros(shape))
    assert max(sizes) <= math.prod(shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": ()}, "widths"),
        ({"widths": (4, 0)}, "widths"),
        ({"widths": (4, 9)}, "groups=2: expected a divisor"),
        ({"blocks": 0}, "blocks=0"),
        ({"latents": -1}, "latents=-1"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"scale": math.nan}, "scale"),
        ({"shift": math.inf}, "shift"),
        ({"remat": "all"}, "remat='all'"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_arguments_that_cannot_be():
    model = made()
    for images in (
        jnp.zeros((6, 8, 3)),
        jnp.zeros((1, 6, 8, 4)),
        jnp.zeros((1, 1, 8, 3)),
    ):
        with pytest.raises(ValueError, match="images have shape"):
            model.encode(images)
    with pytest.raises(TypeError, match="images are uint8"):
        model.encode(np.zeros((1, 6, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="latents have shape"):
        model.decode(jnp.zeros((1, 3, 4, 4)))
