"""Adapters on a decoder, whose blocks are stacked: files, deltas, several at once."""

import dataclasses

import jax
import numpy as np
import pytest
from compiled import called
from flax import nnx

import snella_jax as snella
from snella_jax.models import llama
from snella_jax.nnx.selection import weights_of

TINY = llama.LlamaConfig(
    vocab_size=32, width=16, depth=2, heads=4, kv_heads=2, head_dim=4, mlp_dim=24
)
CONFIG = snella.SnellaConfig(rank=4, allocation="fixed", target_density=0.3)
TEXTS = np.random.default_rng(0).integers(0, 32, (3, 8))


@pytest.fixture(scope="module")
def adapters():
    """The base, and two adapters on it that move the logits."""
    base = llama.Llama(TINY, rngs=nnx.Rngs(0))
    found = {
        name: snella.adapt(base, CONFIG, rngs=nnx.Rngs(seed))
        for seed, name in enumerate(("law", "prose"), 1)
    }
    logits = {name: called(model, TEXTS) for name, model in found.items()}
    assert abs(logits["law"] - logits["prose"]).max() > 1e-3
    return base, found, logits


def test_the_usual_targets_are_the_benchmark_s(adapters):
    _, found, _ = adapters
    paths = {weight.path for weight in weights_of(found["law"])}
    assert paths == {
        *(f"blocks/attn/{name}" for name in ("q", "k", "v")),
        *(f"blocks/mlp/{name}" for name in ("up", "down")),
    }
    trained = nnx.to_flat_state(nnx.state(found["law"], nnx.Param))
    assert all("adapter" in path for path, _ in trained)


def test_a_file_gives_the_adapter_back_bit_for_bit(adapters, tmp_path):
    base, found, logits = adapters
    snella.save(found["law"], tmp_path / "law")
    loaded = snella.load(base, tmp_path / "law")
    assert nnx.split(loaded)[0] == nnx.split(found["law"])[0]
    np.testing.assert_array_equal(called(loaded, TEXTS), logits["law"])
    other = llama.Llama(dataclasses.replace(TINY, rope_theta=5e5), rngs=nnx.Rngs(0))
    with pytest.raises(snella.CheckpointError, match="rope_theta"):
        snella.load(other, tmp_path / "law")


def test_a_delta_file_makes_the_merged_model_of_the_base(adapters, tmp_path):
    base, found, logits = adapters
    merged = snella.merge(found["law"])
    snella.save_delta(tmp_path / "law.safetensors", base, merged)
    applied = snella.apply_delta(base, tmp_path / "law.safetensors")
    back = snella.unmerge(applied, tmp_path / "law.safetensors")
    for model, expected in ((applied, merged), (back, base)):
        ours, theirs = (jax.tree.leaves(nnx.state(m)) for m in (model, expected))
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(called(applied, TEXTS), logits["law"], atol=1e-5)


def test_every_text_of_a_batch_may_have_an_adapter_of_its_own(adapters):
    base, found, logits = adapters
    ids = ["prose", "none", "law"]
    rows = snella.per_example({**found, "none": base}, ids, TEXTS)
    logits = {**logits, "none": called(base, TEXTS)}
    for index, name in enumerate(ids):
        np.testing.assert_allclose(rows[index], logits[name][index], atol=1e-5)


def test_a_sum_of_updates_is_that_of_the_updates(adapters):
    base, found, _ = adapters
    shares = {"law": 0.75, "prose": -0.5}
    plain = snella.combine(found, shares, rest="law")
    deltas = {
        name: {weight.path: weight.delta() for weight in weights_of(model)}
        for name, model in found.items()
    }
    kernels = {
        "blocks/mlp/up": lambda model: model.blocks.mlp.up.kernel[...],
        "blocks/attn/k": lambda model: model.blocks.attn.k.kernel[...],
    }
    for path, kernel in kernels.items():
        update = sum(share * deltas[name][path] for name, share in shares.items())
        np.testing.assert_allclose(kernel(plain), kernel(base) + update, atol=1e-6)
    assert type(plain) is llama.Llama
