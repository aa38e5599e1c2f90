"""What blocks keep, and that the same comes out whatever they keep."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import snella_jax as snella
from snella_jax.models import llama, vit
from snella_jax.models.convnext import ConvNeXt, ConvNeXtConfig
from snella_jax.models.layers.memory import kept_names
from snella_jax.models.sam.tiny_vit import TinyViT, TinyViTConfig
from snella_jax.models.sam.vit_encoder import ViTEncoder, ViTEncoderConfig
from snella_jax.models.sd3 import mmdit
from snella_jax.models.swin import Swin, SwinConfig

WIDTH, TOKENS = 16, 10
VIT = vit.ViTConfig(
    WIDTH, 3, 2, patch_size=2, image_size=6, channels=2, num_classes=5, mlp_dim=64
)
LLAMA = llama.LlamaConfig(
    vocab_size=30, width=12, depth=3, heads=4, kv_heads=2, head_dim=6, mlp_dim=20
)
MMDIT = mmdit.MMDiTConfig(
    width=16, depth=3, heads=2, channels=4, positions=12, context_dim=20, pooled_dim=12
)
SWIN = SwinConfig(8, (2, 2), (2, 4), 2, image_size=20, num_classes=3)
CONVNEXT = ConvNeXtConfig((8, 12), (1, 2), image_size=20, num_classes=3)
SAM = ViTEncoderConfig(
    8, depth=3, heads=2, global_blocks=(1,), mlp_dim=12, window=3, out_channels=6,
    patch_size=2, image_size=(10, 8),
)  # fmt: skip
TINY_VIT = TinyViTConfig(
    (4, 8, 8, 8), (1, 1, 2, 1), (2, 2, 2), (2, 4, 2), out_channels=6, image_size=32
)


def images(side, channels=3):
    return (jnp.asarray(np.random.default_rng(0).normal(size=(2, *side, channels))),)


CASES = {
    "vit": (vit.ViT, VIT, images((6, 6), 2)),
    "swin": (Swin, SWIN, images((20, 20))),
    "convnext": (ConvNeXt, CONVNEXT, images((20, 20))),
    "sam": (ViTEncoder, SAM, images((10, 8))),
    "tiny_vit": (TinyViT, TINY_VIT, images((32, 32))),
    "llama": (llama.Llama, LLAMA, (jnp.arange(10).reshape(2, 5),)),
    "mmdit": (
        mmdit.MMDiT,
        MMDIT,
        (
            *images((8, 12), 4),
            jnp.array([500.0, 731.25]),
            jnp.ones((2, 5, 20)),
            jnp.ones((2, 12)),
        ),
    ),
}


def gradient(name, **changes):
    """The gradient of a model's parameters as a function, and these."""
    cls, config, inputs = CASES[name]
    model = cls(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    for index, leaf in enumerate(leaves := jax.tree.leaves(state)):
        noise = jax.random.normal(jax.random.key(index), leaf.shape)
        leaves[index] = leaf + (0.2 * noise).astype(leaf.dtype)
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)

    def loss(state):
        return jnp.sin(nnx.merge(graphdef, state)(*inputs)).sum()

    return jax.grad(loss), state


def count(jaxpr, name):
    """Times that a primitive stands in a program."""
    own = sum(eqn.primitive.name == name for eqn in jaxpr.eqns)
    inner = (sub for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params))
    return own + sum(count(sub, name) for sub in inner)


@pytest.mark.parametrize("name", CASES)
def test_lean_blocks_compute_no_product_twice(name):
    """Nor do they with steps for a derivative; those named do."""
    counts = {}
    for memory in ("usual", "lean", "lean+hidden"):
        run, state = gradient(name, memory=memory)
        program = jax.make_jaxpr(run)(state).jaxpr
        counts[memory] = sum(
            count(program, kind) for kind in ("dot_general", "conv_general_dilated")
        )
    assert counts["usual"] == counts["lean"] < counts["lean+hidden"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit", {}),
        ("vit", {"stacked": False, "layer_scale": 0.3}),
        ("llama", {}),
        ("mmdit", {}),
    ],
)
def test_gradients_do_not_depend_on_what_is_kept(name, changes):
    found = {}
    for memory in ("usual", "lean", "lean+attention+qkv+hidden"):
        run, state = gradient(name, memory=memory, **changes)
        found[memory] = jax.tree.leaves(jax.jit(run)(state))
    for memory in ("lean", "lean+attention+qkv+hidden"):
        for a, b in zip(found["usual"], found[memory], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def stacked(run, *arguments):
    """What the scanned blocks keep: counts by dtype and numbers of a token."""
    scans, left = [], [jax.make_jaxpr(run)(*arguments).jaxpr]
    while left:
        program = left.pop()
        for eqn in program.eqns:
            if eqn.primitive.name == "scan" and eqn.params["length"] == 3:
                scans.append(eqn)
            left += [*jaxprs_in_params(eqn.params)]
    [forward] = [eqn for eqn in scans if not eqn.params["reverse"]]
    outputs = forward.outvars[forward.params["num_carry"] :]
    found = collections.Counter(
        (str(v.aval.dtype), v.aval.size // 3 / (2 * TOKENS)) for v in outputs
    )
    return {key: n for key, n in found.items() if key[1] >= 1}


def test_what_a_vit_keeps():
    """In numbers of a token: width 16, 64 in the MLP."""
    numbers = ("float32", 1.0)  # two of each norm
    bits, narrow, wide = ("uint8", 16.0), ("float32", 16.0), ("float32", 64.0)

    def left(memory, **changes):
        return stacked(*gradient("vit", memory=memory, **changes))

    # Input and stream, what is read of them, q, k, v, what attention found.
    assert left("usual") == {numbers: 4, narrow: 8, wide: 2}
    assert left("lean") == {numbers: 4, narrow: 6, wide: 1}
    assert left("lean+attention") == {numbers: 4, narrow: 5, wide: 1}
    assert left("lean+attention+qkv") == {numbers: 4, narrow: 2, wide: 1}
    assert left("lean+hidden") == {numbers: 4, narrow: 6}
    steps = left("lean", activation="gelu2")
    assert steps == {numbers: 4, narrow: 6, wide: 1, bits: 1}


@pytest.mark.parametrize(
    ("activation", "of_mlp"),
    [("gelu", [("float32", 64.0)]), ("gelu2", [("uint8", 16.0), ("float32", 32.0)])],
)
def test_what_a_sketched_vit_keeps(activation, of_mlp):
    """Half the rows of what attention found, and with steps of the second layer's."""
    config = snella.SnellaConfig(
        targets=r"blocks/.*/(query|key|value|out|fc1|fc2)", rank=2, sketch=2
    )
    how = dataclasses.replace(VIT, memory="lean", activation=activation)
    model = snella.adapt(vit.ViT(how, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    graphdef, trainable, budgets, frozen = snella.partition(model)

    def loss(trainable, key):
        model = nnx.merge(graphdef, trainable, budgets, frozen, copy=True)
        snella.seed(model, key)
        return jnp.sin(model(*CASES["vit"][2])).sum()

    found = stacked(jax.grad(loss), trainable, jax.random.key(0))
    # Five whole arrays: input and stream, q, k, v. Five of ten rows of a sixth.
    expected = {("float32", 1.0): 4, ("float32", 16.0): 5, ("float32", 8.0): 1}
    softmax = {("float32", 64 / (2 * TOKENS)): 2}  # of fc2's rows; of others fewer
    assert found == expected | softmax | dict.fromkeys(of_mlp, 1)


def test_steps_change_a_gradient_a_little():
    found = []
    for activation in ("gelu", "gelu2"):
        run, state = gradient("vit", activation=activation)
        leaves = jax.tree.leaves(jax.jit(run)(state))
        found.append(np.concatenate([np.ravel(leaf) for leaf in leaves]))
    exact, steps = (one / np.linalg.norm(one) for one in found)
    assert 0.9 < exact @ steps < 0.9999


@pytest.mark.parametrize("name", ["vit", "llama", "mmdit", "sam"])
@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("memory", "leaner", 'memory=\'leaner\': expected "usual", or "lean"'),
        ("memory", None, 'memory=None: expected "usual", or "lean"'),
        ("memory", "lean+norms", r"besides: \+attention, \+qkv, \+hidden"),
        ("activation", "relu", "activation='relu': expected [gs]"),
    ],
)
def test_other_names_are_refused(name, field, value, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(CASES[name][1], **{field: value})


def test_names():
    assert kept_names("usual") is None
    assert kept_names("lean+qkv+hidden") == ("outputs", "stream", "attention")
