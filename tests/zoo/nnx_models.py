"""Small NNX models in the shape of other people's, each with four classes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import snella_jax as snella
from snella_jax import Layout

D, HEADS, KV, SIZE, CLASSES = 8, 4, 2, 2, 4
TOKENS = jax.random.normal(jax.random.key(7), (8, 3, D))
VECTORS = TOKENS[:, 0]
IMAGES = jax.random.normal(jax.random.key(8), (8, 4, 4, 2))


class Einsum(nnx.Module):
    """A language model's own projection: an equation, a weight called `w`."""

    def __init__(self, equation, shape, rngs):
        self.equation = equation
        self.w = nnx.Param(0.3 * jax.random.normal(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class RMSNorm(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jnp.ones(D))

    def __call__(self, x):
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * self.w[...]


class GroupedAttention(nnx.Module):
    """Causal; two heads share a key; `decode` appends to a cache."""

    def __init__(self, rngs):
        self.norm = RMSNorm(rngs)
        self.q_proj = Einsum("btd,dhk->bthk", (D, HEADS, SIZE), rngs)
        self.kv_proj = Einsum("bsd,cdhk->cbshk", (2, D, KV, SIZE), rngs)
        self.o_proj = Einsum("bthk,hkd->btd", (HEADS, SIZE, D), rngs)
        self.seen = nnx.Cache(jnp.zeros((), jnp.int32))
        self.cache = nnx.Cache(jnp.zeros((2, len(TOKENS), TOKENS.shape[1], KV, SIZE)))

    def __call__(self, x):
        k, v = self.kv_proj(self.norm(x))
        causal = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
        return x + self.attend(self.norm(x), k, v, causal)

    def decode(self, x):
        now = self.seen[...]
        new = self.kv_proj(self.norm(x))
        self.cache[...] = jax.lax.dynamic_update_slice(
            self.cache[...], new, (0, 0, now, 0, 0)
        )
        self.seen[...] = now + 1
        known = jnp.arange(self.cache[...].shape[2])[None] <= now
        return x + self.attend(self.norm(x), *self.cache[...], known)

    def attend(self, x, k, v, mask):
        q = self.q_proj(x).reshape(*x.shape[:2], KV, HEADS // KV, SIZE)
        scores = jnp.einsum("btgjk,bsgk->bgjts", q, k)
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), -1)
        y = jnp.einsum("bgjts,bsgk->btgjk", weights, v)
        return self.o_proj(y.reshape(*x.shape[:2], HEADS, SIZE))


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.attn = GroupedAttention(rngs)
        self.head = nnx.Linear(D, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(self.attn(x)[:, -1])


class GatedMlp(nnx.Module):
    """Three weights of one module; the last is used once more, the other way round."""

    def __init__(self, rngs):
        draw = nnx.initializers.lecun_normal()
        self.w_gate = nnx.Param(draw(rngs.params(), (D, 12)))
        self.w_up = nnx.Param(draw(rngs.params(), (D, 12)))
        self.w_down = nnx.Param(draw(rngs.params(), (12, D)))
        self.drop = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        hidden = jax.nn.silu(x @ self.w_gate[...]) * (x @ self.w_up[...])
        return self.drop(self.down(hidden))

    def down(self, hidden):
        return hidden @ self.w_down[...]

    def back(self, x):
        return x @ self.w_down[...].T


class Gated(nnx.Module):
    def __init__(self, rngs):
        self.mlp = GatedMlp(rngs)
        self.head = nnx.Linear(12, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(self.mlp.back(self.mlp(x)))


class Block(nnx.Module):
    """adaLN: the norm's scale and shift come from a condition."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, use_bias=False, use_scale=False, rngs=rngs)
        self.modulation = nnx.Linear(D, 2 * D, rngs=rngs)
        self.fc = nnx.Linear(D, D, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        scale, shift = jnp.split(self.modulation(nnx.silu(x)), 2, -1)
        return x + self.drop(self.fc(self.norm(x) * (1 + scale) + shift))


class Conditioned(nnx.Module):
    """Blocks run one by one, each recomputed on the way back."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(D, CLASSES, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return self.head(x)


def stacked(build, axis):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: None}),), out_axes=axis)
    def make(rngs):
        return build(rngs)

    return make


class Scanned(nnx.Module):
    """Stacked along axis 0, scanned by the kind of variable."""

    axes = nnx.StateAxes({(nnx.Param, snella.Frozen, snella.Budget): 0, ...: 0})
    out = 0

    def __init__(self, rngs):
        self.blocks = stacked(Block, self.out)(rngs)
        self.head = nnx.Linear(D, CLASSES, rngs=rngs)

    def __call__(self, x):
        scan = nnx.scan(in_axes=(nnx.Carry, self.axes), out_axes=nnx.Carry)
        return self.head(scan(lambda x, block: block(x))(x, self.blocks))


ADAPTERS = nnx.PathContains("adapter", exact=False)


class ScannedBehind(Scanned):
    """Stacked along axis 1, as some train their language models."""

    axes = nnx.StateAxes({ADAPTERS: 0, (nnx.Param, snella.Frozen): 1, ...: 0})
    out = nnx.StateAxes({nnx.Param: 1, ...: 0})


class Pair(nnx.Linear):
    """Returns how large its output is, too."""

    def __call__(self, x):
        y = super().__call__(x)
        return {"y": y, "size": jnp.abs(y).mean(), "largest": jnp.argmax(y)}


class Balanced(nnx.Module):
    def __init__(self, rngs):
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((1,), ("model",), axis_types=auto)
        draw, zeros = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()

        def linear(cls, n, m):
            kernel = nnx.with_partitioning(draw, (None, "model"), mesh=mesh)
            bias = nnx.with_partitioning(zeros, ("model",), mesh=mesh)
            return cls(n, m, kernel_init=kernel, bias_init=bias, rngs=rngs)

        self.fc = linear(Pair, D, 12)
        self.head = linear(nnx.Linear, 12, CLASSES)

    def __call__(self, x):
        out = self.fc(x)
        return self.head(jnp.tanh(out["y"]) / (1 + out["size"]))


class Convolved(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, D, (2, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.head = nnx.Linear(D, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


@dataclasses.dataclass(frozen=True)
class Member:
    """A model of the zoo.

    Attributes:
      build: from `nnx.Rngs`.
      inputs: eight examples.
      targets: regex.
      place: for every adapted weight by path, the weight's update from those of its
        matrices `[*lead, n, m]`.
      layouts: of own weights.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    inputs: jax.Array
    targets: str
    place: Mapping[str, Callable]
    layouts: Mapping[str, Layout] = dataclasses.field(default_factory=dict)


def same(deltas: Any) -> Any:
    return deltas


ZOO = {
    "grouped_attention": Member(
        Decoder,
        TOKENS,
        r".*_proj",
        {
            "attn/q_proj/w": lambda d: d.reshape(D, HEADS, SIZE),
            "attn/kv_proj/w": lambda d: d.reshape(2, D, KV, SIZE),
            "attn/o_proj/w": lambda d: d.reshape(HEADS, SIZE, D),
        },
        {
            ".*q_proj/w": Layout((D,), (HEADS, SIZE)),
            ".*kv_proj/w": Layout((D,), (KV, SIZE), (2,)),
            ".*o_proj/w": Layout((HEADS, SIZE), (D,)),
        },
    ),
    "several_weights": Member(
        Gated,
        VECTORS,
        "mlp",
        {"mlp/w_gate": same, "mlp/w_up": same, "mlp/w_down": same},
        {"mlp/w_(gate|up)": Layout((D,), (12,)), "mlp/w_down": Layout((12,), (D,))},
    ),
    "adaptive_norm_remat": Member(
        Conditioned,
        VECTORS,
        "blocks/.*",
        {f"blocks/{i}/{n}": same for i in range(2) for n in ("fc", "modulation")},
    ),
    "scan": Member(
        Scanned, VECTORS, "blocks/.*", {"blocks/fc": same, "blocks/modulation": same}
    ),
    "scan_axis_1": Member(
        ScannedBehind,
        VECTORS,
        "blocks/.*",
        {f"blocks/{n}": lambda d: d.swapaxes(0, 1) for n in ("fc", "modulation")},
    ),
    "tree_out": Member(Balanced, VECTORS, "fc", {"fc": same}),
    "batch_norm": Member(
        Convolved, IMAGES, "conv", {"conv": lambda d: d.reshape(2, 2, 2, D)}
    ),
}
