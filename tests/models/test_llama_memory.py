"""What loading a LLaMA takes of memory, and that SNELLA counts beyond 32 bits."""

import sys

import gguf
import jax
import jax.numpy as jnp
import loading
import numpy as np
import pytest
from flax import nnx

import snella_jax as snella
from snella_jax import models
from snella_jax.core.factors import factors as factors_of
from snella_jax.core.importance import ImportanceState
from snella_jax.models import llama

SIZES = {"width": 1024, "depth": 6, "heads": 8, "kv_heads": 8, "mlp_dim": 4096}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_memory_of_the_weights(tmp_path):
    """Beside 230 MB of weights in bfloat16, 460 in float32: at most a quarter more."""
    model = llama.create(
        "llama2_7b",
        **SIZES,
        vocab_size=16000,
        param_dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )
    for name, shard in {"whole": 10**9, "shards": 5 * 10**7}.items():
        models.export(model, tmp_path / name, max_shard_bytes=shard)
        for dtype in ("bfloat16", "float32"):
            taken = loading.peak("snella_jax.models", tmp_path / name, dtype)
            assert 0.9 < taken <= 1.25, (name, dtype)


def quantised(path, kind):
    """Writes a LLaMA of `SIZES` as GGUF: random rows of blocks, again and again."""
    writer, width = gguf.GGUFWriter(path, "llama"), SIZES["width"]
    writer.add_block_count(SIZES["depth"])
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(SIZES["mlp_dim"])
    writer.add_head_count(SIZES["heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    square, wide = (width, width), (SIZES["mlp_dim"], width)
    shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), square)
    shapes |= {"ffn_gate": wide, "ffn_up": wide, "ffn_down": wide[::-1]}
    matrices = {"token_embd": (16000, width), "output": (16000, width)}
    norms = ["output_norm"]
    for block in range(SIZES["depth"]):
        matrices |= {f"blk.{block}.{name}": shape for name, shape in shapes.items()}
        norms += [f"blk.{block}.attn_norm", f"blk.{block}.ffn_norm"]
    random = np.random.default_rng(0)
    for name, (rows, columns) in matrices.items():
        some = random.normal(size=(8, columns)).astype(np.float32)
        blocks = np.tile(gguf.quants.quantize(some, kind), (rows // 8, 1))
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_gguf_takes_the_memory_of_the_weights(tmp_path):
    """133 million weights: blocks are taken apart a few rows at a time."""
    path = tmp_path / "made.gguf"
    quantised(path, gguf.GGMLQuantizationType.Q4_1)
    for dtype in ("bfloat16", "float32"):
        taken = loading.peak("snella_jax.models", path, dtype)
        assert 0.9 < taken <= 1.25, (dtype, taken)


def test_seven_billion_weights_are_counted_and_divided():
    """Only shapes: 4.5e9 weights of q, k, v, up and down are beyond 2^32."""
    config = snella.SnellaConfig(rank=8)

    def adapted():
        base = models.create("llama2_7b", rngs=nnx.Rngs(0))
        return snella.adapt(base, config, rngs=nnx.Rngs(1))

    model = nnx.eval_shape(adapted)
    weights = 32 * (3 * 4096**2 + 2 * 4096 * 11008)
    assert weights > 2**32 and snella.adapted_weights(model) == weights
    shapes = nnx.split(model, nnx.Param, ...)[1]
    trained = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(shapes)}
    assert {path.rpartition("/adapter/")[0] for path in trained} == {
        *(f"blocks/attn/{name}" for name in "qkv"),
        *(f"blocks/mlp/{name}" for name in ("up", "down")),
    }

    _, _, budgets, _ = snella.partition(model)
    budgets = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), budgets)
    factors = factors_of(shapes)
    state = ImportanceState(np.int32(7), factors, factors)
    total = config.schedule(weights, steps=10)(1)
    assert total > 2**32 * 0.7
    scores = {path: np.arange(1.0, 33.0) for path in factors}
    moved, report = snella.reallocate(budgets, state, total, scores=scores)
    assert report.budgets.sum() == total and report.capacities.sum() == weights
    leaves = jax.tree.leaves(moved)
    assert all(leaf.dtype == np.int32 and (leaf >= 0).all() for leaf in leaves)
