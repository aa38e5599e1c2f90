"""Pictures of a pipeline against a loop by hand, with stand-ins for its components."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snella_jax as snella
from snella_jax.models.sd3 import flow, mmdit, pipeline
from snella_jax.models.sd3 import mesh as mesh_of
from snella_jax.models.sd3.pipeline import Pipeline
from snella_jax.nnx import generation

STEPS = 3
SIZE = (16, 24)  # of pictures: 4 x 6 latents
SHAPE = (4, 6, 2)


@dataclasses.dataclass(frozen=True)
class Config:
    channels: int = 2
    patch: int = 2
    positions: int = 8
    context_dim: int = 3
    pooled_dim: int = 4
    latents: int = 2


class Transformer(nnx.Module):
    """Velocities that depend on every argument and on a row's neighbours within it."""

    def __init__(self, config=Config()):
        numbers = np.random.default_rng(0).normal(size=(4, config.channels))
        self.config = config
        self.kernel = nnx.Param(jnp.float32(numbers))

    def __call__(self, x, time, context, pooled):
        text = context.mean(1) @ self.kernel[:3] + pooled @ self.kernel[...]
        mixed = x + 0.3 * jnp.roll(x, 1, 1) * (time / 1000)[:, None, None, None]
        return jnp.tanh(mixed + text[:, None, None, :])


class Vae(nnx.Module):
    """A decoder that makes four by four pixels of a latent."""

    scale, shift, factor = 1.5, 0.2, 4

    def __init__(self, config=Config()):
        self.config = config
        self.kernel = nnx.Param(jnp.float32([[0.5, -0.2, 0.1], [0.3, 0.4, -0.6]]))

    def decode(self, z):
        return jnp.repeat(jnp.repeat(z, 4, 1), 4, 2) @ self.kernel[...]


class Encoder:
    """Encodings that are functions of a text's letters alone."""

    def encode(self, prompts):
        rows = [
            np.random.default_rng(list(prompt.encode())).normal(size=19)
            for prompt in prompts
        ]
        numbers = np.float32(rows)
        return numbers[:, :15].reshape(-1, 5, 3), numbers[:, 15:]


def made(**options: Any) -> Pipeline:
    return Pipeline(Transformer(), Vae(), Encoder(), **options)


def key(number=0):
    return jax.random.key(number)


def by_hand(transformer, vae, noise, prompt, negative, guidance, shift=3.0):
    """One picture, step by step, with guidance and decoding written out."""
    sigmas = np.float64(flow.sampling_sigmas(STEPS, shift))
    x = jnp.asarray(noise)[None]
    for sigma, following in itertools.pairwise(sigmas):
        v, v_empty = (
            transformer(x, jnp.float32([1000 * sigma]), *Encoder().encode([text]))
            for text in (prompt, negative)
        )
        x = x + (following - sigma) * (v_empty + guidance * (v - v_empty))
    if vae is not None:
        x = vae.decode(x / vae.scale + vae.shift)
    return np.clip(np.float64(x[0]) * 127.5 + 127.5, 0, 255)


def close(pictures, expected):
    """Equal but for half a level of rounding and a little more."""
    assert pictures.dtype == np.uint8
    np.testing.assert_allclose(np.float64(pictures), expected, rtol=0, atol=0.51)


def same(pictures, others):
    """Equal but for values that rounding put on the other side of a half."""
    difference = np.abs(np.int32(pictures) - np.int32(others))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize("guidance", [7.0, 0.0, 1.0])
def test_pictures_are_those_of_a_loop_by_hand(guidance):
    noise = np.float32(np.random.default_rng(1).normal(size=(2, *SHAPE)))
    prompts, negatives = ["a dog", "a red car"], ["", "a cat"]
    options = {"steps": STEPS, "guidance": guidance, "size": SIZE, "noise": noise}
    pictures = made()(prompts, negatives, **options)
    assert pictures.shape == (2, *SIZE, 3)
    for picture, *own in zip(pictures, noise, prompts, negatives, strict=True):
        close(picture, by_hand(Transformer(), Vae(), *own, guidance))


def test_without_a_vae_latents_are_pixels_and_the_shift_is_that_of_the_pipeline():
    model = Transformer(Config(channels=3))
    noise = np.float32(np.random.default_rng(1).normal(size=(1, 8, 8, 3)))
    drawn = Pipeline(model, None, Encoder(), shift=1.0)
    picture = drawn("a dog", steps=STEPS, guidance=3, size=8, noise=noise)[0]
    close(picture, by_hand(model, None, noise[0], "a dog", "", 3, shift=1.0))


def test_noise_is_that_of_each_pictures_key():
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key(5), jnp.arange(2))
    noise = jnp.stack([jax.random.normal(own, SHAPE) for own in keys])
    options = {"steps": STEPS, "size": SIZE}
    expected = made()(["a dog", "a cat"], noise=noise, **options)
    for given in (key(5), keys, jax.random.key_data(keys), jax.random.PRNGKey(5)):
        found = made()(["a dog", "a cat"], key=given, **options)
        np.testing.assert_array_equal(found, expected)


def test_a_picture_does_not_depend_on_its_batch():
    texts, options = ["a dog", "a cat", "a dog"], {"steps": STEPS, "size": SIZE}
    keys = jax.random.split(key(), 3)
    together = made()(texts, key=keys, **options)
    for place, text in enumerate(texts):
        alone = made()(text, key=keys[place : place + 1], **options)
        same(together[place], alone[0])
    assert np.abs(np.int32(together[0]) - np.int32(together[2])).max() > 20


def test_one_prompt_is_drawn_for_every_key():
    keys, options = jax.random.split(key(), 3), {"steps": STEPS, "size": SIZE}
    found = made()("a dog", key=keys, **options)
    np.testing.assert_array_equal(found, made()(["a dog"] * 3, key=keys, **options))


def test_one_program_is_compiled_for_a_shape():
    drawn, options = made(), {"steps": STEPS, "size": SIZE}
    drawn(["a dog", "a cat"], key=key(), **options)
    before = pipeline._drawn._cache_size()
    drawn(["a bird", "a red car"], "a cat", key=key(1), guidance=2.5, **options)
    moved = Transformer()
    moved.kernel[...] += 1
    drawn.with_transformer(moved)("a tree", key=jax.random.split(key(), 2), **options)
    encoded = drawn.encode(["a dog", "a cat"])
    drawn.without_encoders()(encoded, drawn.encode(""), key=key(), **options)
    assert pipeline._drawn._cache_size() == before
    drawn(["a dog", "a cat"], key=key(), steps=STEPS, size=24)
    assert pipeline._drawn._cache_size() == before + 1


@pytest.mark.parametrize(
    "axes",
    [{"data": 4}, {"data": 2, "model": 2}, {"model": 2}, {"fsdp": 2, "tensor": 2}],
    ids=str,
)
def test_a_mesh_draws_the_same_pictures(axes):
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), devices=devices)
    texts, options = [f"a dog {i}" for i in range(4)], {"steps": STEPS, "size": SIZE}
    drawn = made(mesh=mesh)
    found = drawn(texts, key=key(), **options)
    same(found, made()(texts, key=key(), **options))
    given = found if "fsdp" not in axes else mesh_of.split(found, drawn.mesh)
    rows = given.addressable_shards[0].data.shape[0]
    assert rows == 4 // axes.get("data", axes.get("fsdp", 1))
    kernel = drawn.transformer.kernel[...].addressable_shards[0].data
    outputs = 2 // axes.get("model", axes.get("tensor", 1))
    assert kernel.shape == (4 // axes.get("fsdp", 1), outputs)
    if "data" in axes:
        with pytest.raises(ValueError, match="3 pictures on a mesh with data="):
            drawn(texts[:3], key=key(), **options)


def test_a_mesh_has_the_axes_data_and_model():
    with pytest.raises(ValueError, match="axes x: expected data, fsdp, tensor, model"):
        made(mesh=jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]))


NOISE = np.zeros((2, *SHAPE))
WRONG = {
    "a size between": ({"size": 12}, "size=12: expected multiples of 8, up to 64"),
    "a size too large": ({"size": (64, 72)}, "expected multiples of 8, up to 64"),
    "a size of nothing": ({"size": 0}, "size=0: expected multiples"),
    "no key": ({"key": None}, "either a key or noise"),
    "both": ({"noise": NOISE}, "either a key or noise"),
    "noise of another size": ({"noise": NOISE[:, 1:], "key": None}, "B, 4, 6, 2"),
    "noise of one channel": ({"noise": NOISE[0], "key": None}, "noise has shape"),
    "keys for others": ({"key": jax.random.split(key(), 3)}, r"shape \(3,\) for 2"),
    "a table of keys": ({"key": jax.random.split(key(), (2, 2))}, "expected one key"),
    "negatives for others": ({"negative": ["a"] * 3}, "negative: 3 for 2 pictures"),
    "noise for others": ({"noise": NOISE[[0, 1, 0]], "key": None}, "2 for 3 pictures"),
    "no prompts": ({"prompt": []}, "there is none"),
    "no negatives": ({"negative": ()}, "there is none"),
    "no steps": ({"steps": 0}, "steps=0"),
    "wild guidance": ({"guidance": float("nan")}, "guidance=nan: expected a number"),
    "context of another width": (
        {"prompt": (np.zeros((2, 5, 4)), np.zeros((2, 4)))},
        r"prompt: context \(2, 5, 4\) and pooled \(2, 4\), expected .* 3.* 4",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_arguments_that_fit_nothing_are_named(wrong):
    changes, message = WRONG[wrong]
    given = {"prompt": ["a dog", "a cat"], "size": SIZE, "key": key()} | changes
    with pytest.raises(ValueError, match=message):
        made()(**given)


def test_prompts_are_strings():
    with pytest.raises(TypeError, match="int, expected strings"):
        made()(["a dog", 3], size=SIZE, key=key())


def test_components_fit_each_other():
    with pytest.raises(ValueError, match="channels=2: expected 3, those of pixels"):
        Pipeline(Transformer(), None, Encoder())
    with pytest.raises(ValueError, match="expected 5, those of the VAE's latents"):
        Pipeline(Transformer(), Vae(Config(latents=5)), Encoder())
    with pytest.raises(ValueError, match="text encoders were dropped"):
        made().without_encoders()("a dog", size=SIZE, key=key())


def test_an_adapted_transformer_is_merged_once(monkeypatch):
    sizes = {"width": 16, "depth": 2, "heads": 2, "channels": 3, "positions": 6}
    config = mmdit.MMDiTConfig(**sizes, context_dim=3, pooled_dim=4)
    noise = np.random.default_rng(0)  # as an MMDiT begins, its blocks do little
    shapes = nnx.eval_shape(lambda: mmdit.MMDiT(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(shapes)
    drawn = [jnp.float32(noise.normal(0, 0.2, x.shape)) for x in jax.tree.leaves(state)]
    base = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), drawn))
    drawn = Pipeline(base, None, Encoder())
    targets = {"targets": "blocks/image/attn/(q|v)", "allocation": "fixed"}
    model = snella.adapt(base, snella.SnellaConfig(rank=2, **targets), rngs=nnx.Rngs(1))
    for _, factor in nnx.to_flat_state(nnx.state(model, snella.Factor)):
        factor[...] += 0.5
    with pytest.raises(ValueError, match=r"has adapters: .*snella\.merge\(model\)"):
        drawn.with_transformer(model)
    options = {"steps": 5, "size": 8, "key": key()}
    before = drawn("a dog", **options)
    compiled = pipeline._drawn._cache_size()
    expected = drawn.with_transformer(snella.merge(model))("a dog", **options)
    merges = []

    def merge(*arguments, **given):
        merges.append(arguments)
        return snella.merge(*arguments, **given)

    monkeypatch.setattr(generation, "merge", merge)
    found = snella.pictures(drawn, model, "a dog", **options)
    np.testing.assert_array_equal(found, expected)
    assert np.abs(np.int32(found) - np.int32(before)).max() > 1
    assert len(merges) == 1 and pipeline._drawn._cache_size() == compiled
    np.testing.assert_array_equal(
        snella.pictures(drawn, base, "a dog", **options), before
    )
    assert len(merges) == 1
    with pytest.raises(TypeError, match="Linear draws nothing: expected an MMDiT"):
        snella.pictures(drawn, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "a dog")
