"""Whole pipelines from files, against what diffusers 0.42.1 drew with them."""

import importlib.util
import json
import shutil
from functools import cache, partial

import jax
import jax.numpy as jnp
import mmdit_files
import numpy as np
import pytest
import single_files
from flax import nnx
from places import ASSETS
from safetensors.numpy import load_file, save_file

from snella_jax.models import sd3
from snella_jax.models.sd3 import flow, pipeline_files
from snella_jax.models.sd3.single_file import PREFIXES

HERE = ASSETS / "sd3"
WHOLE = HERE / "pipeline"
PROMPTS, NEGATIVE = ["a photo of sks dog, 2 hats", "two dogs"], "grey"
OPTIONS = {"steps": 4, "guidance": 5.0, "size": (16, 24)}


@cache
def loaded(folder=WHOLE, **options):
    return sd3.load(folder, t5_length=24, **options)


def expected(folder=HERE):
    with np.load(folder / "expected.npz") as arrays:
        return dict(arrays)


def close(got, of, atol=1e-4):
    np.testing.assert_allclose(got, of, rtol=0, atol=atol * np.abs(of).max())


def same(pictures, others):
    difference = np.abs(np.int32(pictures) - np.int32(others))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02


def latents(pipeline, noise):
    """The sampler's latents, before they are decoded."""
    text, empty = pipeline.encode(PROMPTS), pipeline.encode(NEGATIVE)
    graphdef, state = nnx.split(pipeline.transformer)

    @jax.jit
    def run(state, noise, text, empty):
        model = nnx.merge(graphdef, state)
        return flow.sample(model, noise, *text, empty, steps=4, guidance=5.0)

    return run(state, noise, text, empty)


def test_latents_and_pictures_are_those_of_diffusers():
    theirs = expected()
    close(latents(loaded(), theirs["noise"]), theirs["latents"])
    same(
        loaded()(PROMPTS, NEGATIVE, noise=theirs["noise"], **OPTIONS),
        theirs["pictures"],
    )


@pytest.mark.reference
def test_another_pipeline_of_diffusers(tmp_path):
    """Made, drawn with and saved now, with other random numbers."""
    pytest.importorskip("diffusers")
    spec = importlib.util.spec_from_file_location("make", HERE / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    make.main(tmp_path, seed=1)
    theirs, ours = expected(tmp_path), sd3.load(tmp_path / "pipeline", t5_length=24)
    close(latents(ours, theirs["noise"]), theirs["latents"])
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    split = sd3.load(tmp_path / "pipeline", t5_length=24, mesh=mesh)
    for pipeline in (ours, split):
        pictures = pipeline(PROMPTS, NEGATIVE, noise=theirs["noise"], **OPTIONS)
        same(pictures, theirs["pictures"])


def without_t5(folder):
    """A folder that diffusers saved without T5."""
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / name)
        index[name] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")


def test_without_t5_zeros_stand_in_its_place(tmp_path):
    folder = shutil.copytree(WHOLE, tmp_path / "pipeline")
    without_t5(folder)
    whole, _ = loaded().encode(PROMPTS)
    for path in (folder, WHOLE):
        context, pooled = loaded(path, t5=False).encode(PROMPTS)
        np.testing.assert_array_equal(pooled, loaded().encode(PROMPTS)[1])
        np.testing.assert_array_equal(context[:, :77], whole[:, :77])
        assert context.shape == whole.shape and not np.any(context[:, 77:])
    given = loaded(
        folder, t5=WHOLE / "text_encoder_3", t5_tokenizer=WHOLE / "tokenizer_3"
    )
    np.testing.assert_array_equal(given.encode(PROMPTS)[0], whole)


def test_text_encoders_on_the_host_stay_and_compute_there():
    last, host = jax.devices()[-1], jax.devices("cpu")[0]
    with jax.default_device(last):
        pipeline = loaded(text_on="host")
        context, _ = pipeline.encode(PROMPTS)
    assert pipeline.transformer.head.kernel[...].devices() == {last}
    assert pipeline.encoders.t5.embed.embedding[...].devices() == {host}
    assert context.devices() == {host}
    np.testing.assert_array_equal(context, loaded().encode(PROMPTS)[0])


def test_weights_are_placed_on_a_mesh():
    pipeline = loaded(mesh=jax.make_mesh((2, 2), ("data", "model")))
    for model, shape in (
        (pipeline.transformer.head.kernel, (16, 16 // 2)),
        (pipeline.vae.decoder.conv_in.kernel, (3, 3, 4, 8 // 2)),
        (pipeline.encoders.t5.embed.embedding, (140, 20 // 2)),
    ):
        assert model[...].addressable_shards[0].data.shape == shape


def test_dtypes_and_options_are_those_of_the_transformer_and_the_text_encoders():
    half = loaded(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat="blocks")
    assert half.transformer.config.dtype == half.transformer.config.param_dtype
    assert half.transformer.config.remat == "blocks"
    kernels = [half.transformer.head.kernel, half.encoders.clip_l.blocks.attn.q.kernel]
    assert {kernel.dtype for kernel in kernels} == {jnp.dtype(jnp.bfloat16)}
    weights = nnx.to_flat_state(nnx.state(half.vae, nnx.Param))
    assert {weight.dtype for _, weight in weights} == {jnp.dtype(jnp.float32)}


TOKENIZERS = {
    "tokenizer": WHOLE / "tokenizer",
    "t5_tokenizer": WHOLE / "tokenizer_3" / "tokenizer.json",
}
FILES = {
    "mmdit": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "clip_l": "text_encoder/model.safetensors",
    "clip_g": "text_encoder_2/model.safetensors",
    "t5": "text_encoder_3/model.safetensors",
}


def single(path, *parts):
    """Writes a single file of the same numbers, as Stability's have them."""
    found = {}
    for part in parts:
        tensors = load_file(WHOLE / FILES[part])
        if part == "mmdit":
            tensors = mmdit_files.single_of(tensors)
        if part == "vae":
            tensors = single_files.of_stability(tensors, 2)
        if part == "clip_l":  # the identity, which they may leave out
            del tensors["text_projection.weight"]
        found |= single_files.prefixed(tensors, PREFIXES[part])
    save_file(found, path)
    return path


@pytest.fixture
def tiny(monkeypatch):
    """What single files do not say is as in the tiny pipeline, not as published."""
    clip, t5 = sd3.clip.load, pipeline_files.load_t5
    monkeypatch.setattr(sd3.mmdit, "load", partial(sd3.mmdit.load, heads=2))
    sizes = {"groups": 2, "scale": 1.5, "shift": 0.25}
    monkeypatch.setattr(sd3.vae, "load", partial(sd3.vae.load, **sizes))
    monkeypatch.setattr(sd3.clip, "load", partial(clip, heads=2))
    monkeypatch.setattr(pipeline_files, "load_t5", partial(t5, distance=20))


def test_single_files_draw_the_same_pictures(tmp_path, tiny):
    every = single(tmp_path / "sd3_medium_incl_clips_t5xxlfp16.safetensors", *FILES)
    bare = single(tmp_path / "sd3_medium.safetensors", "mmdit", "vae")
    alone = {
        part: single(tmp_path / f"{part}.safetensors", part)
        for part in ("clip_l", "clip_g", "t5")
    }
    noise = expected()["noise"]
    for path, given in ((every, {}), (bare, alone)):
        pipeline = sd3.load(path, **TOKENIZERS, **given, t5_length=24)
        pictures = pipeline(PROMPTS, NEGATIVE, noise=noise, **OPTIONS)
        same(pictures, expected()["pictures"])


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        (("mmdit", "vae"), {}, "no clip_g, clip_l, t5, t5_tokenizer: expected clip_g="),
        (("mmdit", "vae"), {"t5": False}, "no clip_g, clip_l: expected clip_g=PATH"),
        (("mmdit", "vae", "clip_l", "clip_g"), {}, "t5=False goes without T5"),
        (tuple(FILES), {}, "no t5_tokenizer: expected t5_tokenizer=PATH"),
        (("mmdit",), {"t5": False}, "holds no first_stage_model"),
        (("vae", "clip_l"), {}, "holds no model.diffusion_model"),
    ],
)
def test_what_a_single_file_lacks_is_named_with_what_to_give(
    parts, options, message, tmp_path
):
    path = single(tmp_path / "a.safetensors", *parts)
    with pytest.raises(ValueError, match=message) as raised:
        sd3.load(path, **options)
    assert str(path) in str(raised.value)
