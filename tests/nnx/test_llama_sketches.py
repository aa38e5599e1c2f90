"""What a LLaMA's blocks keep of sketched inputs: one for all readers of an array."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import snella_jax as snella
from snella_jax.models import llama

WIDE = llama.LlamaConfig(
    vocab_size=30, width=12, depth=2, heads=4, kv_heads=2, head_dim=6, mlp_dim=20
)
BATCH, TOKENS, KEPT = 3, 18, 5  # a quarter of the tokens


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "scanned"])
def test_q_k_and_v_and_gate_and_up_keep_one_sketch_each(stacked):
    """A block keeps four: of two normed inputs (12), of o's (24), down's (20)."""
    config = dataclasses.replace(WIDE, stacked=stacked, dtype=jnp.bfloat16)
    model = llama.Llama(config, rngs=nnx.Rngs(0))
    rule = snella.SnellaConfig(rank=4, sketch=4, targets="blocks/.*", trainable="")
    model = snella.adapt(model, rule, rngs=nnx.Rngs(1))
    graphdef, trainable, *rest = snella.partition(model)
    tokens = jax.random.randint(jax.random.key(2), (BATCH, TOKENS), 0, 30)

    def loss(trainable):
        seeded = nnx.merge(graphdef, trainable, *rest, copy=True)
        snella.seed(seeded, jax.random.key(3))
        return (seeded(tokens) ** 2).sum()

    _, back = jax.vjp(loss, trainable)
    shapes = [leaf.shape for leaf in jax.tree.leaves(back)]
    kept = collections.Counter(
        shape[-1] for shape in shapes if shape[-3:-1] == (BATCH, KEPT)
    )
    blocks = 1 if stacked else config.depth
    assert kept == {12: 2 * blocks, 24: blocks, 20: blocks}
