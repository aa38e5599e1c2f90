"""Small Linen models in the shape of other people's, each with four classes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from snella_jax import Layout

B, T, D, HEADS, KV, SIZE, CLASSES = 8, 5, 8, 4, 2, 2, 4
IDS = jax.random.randint(jax.random.key(6), (B, T), 0, 11)
TOKENS = jax.random.normal(jax.random.key(7), (B, T, D))
IMAGES = jax.random.normal(jax.random.key(8), (B, 4, 4, 2))
NORMAL = nn.initializers.normal(0.3)


class Einsum(nn.Module):
    """A language model's own projection: the equation comes with the call."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("w", NORMAL, self.shape))


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * (1 + scale)


class GroupedAttention(nn.Module):
    """Causal; two heads share a key. With `decode`, keys go into a cache."""

    def setup(self):
        self.q_einsum = Einsum((HEADS, D, SIZE))
        self.kv_einsum = Einsum((2, KV, D, SIZE))
        self.attn_vec_einsum = Einsum((HEADS, SIZE, D))

    @nn.compact
    def __call__(self, x, decode=False):
        q = self.q_einsum("btd,hdk->bthk", x).reshape(*x.shape[:2], KV, -1, SIZE)
        kv = self.kv_einsum("bsd,chdk->cbshk", x)
        seen = jnp.arange(x.shape[1])
        if decode:
            shape = (2, len(x), T, KV, SIZE)
            cache = self.variable("cache", "kv", jnp.zeros, shape)
            index = self.variable("cache", "index", lambda: jnp.zeros((), int))
            seen = seen + index.value
            kv = jax.lax.dynamic_update_slice(cache.value, kv, (0, 0, seen[0], 0, 0))
            cache.value, index.value = kv, index.value + x.shape[1]
        mask = jnp.arange(kv.shape[2]) <= seen[:, None]
        scores = jnp.einsum("btgjk,bsgk->bgjts", q, kv[0])
        weights = nn.softmax(jnp.where(mask, scores, -1e9))
        y = jnp.einsum("bgjts,bsgk->btgjk", weights, kv[1])
        return self.attn_vec_einsum("bthk,hkd->btd", y.reshape(*x.shape[:2], HEADS, -1))


class FeedForward(nn.Module):
    """Two weights in one module, three matrices."""

    @nn.compact
    def __call__(self, x):
        up = self.param("gating_einsum", NORMAL, (2, D, 12))
        down = self.param("linear", NORMAL, (12, D))
        return (nn.gelu(x @ up[0]) * (x @ up[1])) @ down


class Embedder(nn.Module):
    """Reads and writes by one table."""

    def setup(self):
        self.input_embedding = self.param("input_embedding", NORMAL, (11, D))

    def encode(self, ids):
        return self.input_embedding[ids] * D**0.5

    def decode(self, x):
        return x @ self.input_embedding.T


class Decoder(nn.Module):
    """Gemma's shape."""

    @nn.compact
    def __call__(self, ids, train=False, decode=False):
        embedder = Embedder(name="embedder")
        x = embedder.encode(ids)
        x = x + GroupedAttention(name="attn")(RMSNorm()(x), decode)
        x = x + FeedForward(name="mlp")(RMSNorm()(x))
        return embedder.decode(RMSNorm(name="head")(x))[..., :CLASSES].mean(1)


def boxed(names):
    return nn.with_logical_partitioning(NORMAL, names)


class DenseGeneral(nn.Module):
    """A linear layer of one's own, with names of axes; its dtype is the input's."""

    features: int
    names: tuple[str, str]

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", boxed(self.names), (x.shape[-1], self.features))
        contracted = ((x.ndim - 1,), (0,)), ((), ())
        return jax.lax.dot_general(x, jnp.asarray(kernel, x.dtype), contracted)


class ScannedLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = RMSNorm(name="norm")(x)
        y = nn.tanh(DenseGeneral(D, ("embed", "mlp"), name="wi")(y))
        init = boxed(("mlp", "embed"))
        y = nn.Dense(D, use_bias=False, kernel_init=init, name="wo")(y)
        return x + y, None


class Scanned(nn.Module):
    """MaxText's shape: layers stacked behind the first axis, names for shardings.

    There are as many layers as features: the axes of a weight do not tell the stack's.
    """

    axis: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        axes = {"params": self.axis}
        x, _ = nn.scan(
            nn.remat(ScannedLayer, prevent_cse=False),
            variable_axes=axes,
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=D,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(name="layers")(x, None)
        return nn.Dense(CLASSES, name="head")(x.mean(1))


class Modulation(nn.Dense):
    """adaLN's: six of what its layer makes of a condition, as a tuple."""

    @nn.compact
    def __call__(self, condition):
        return tuple(jnp.split(super().__call__(nn.silu(condition)), 6, -1))


class AdaptiveBlock(nn.Module):
    @nn.compact
    def __call__(self, x, condition, train):
        *attend, shift, scale, gate = Modulation(6 * D, name="modulation")(condition)
        plain = {"use_bias": False, "use_scale": False}
        y = nn.LayerNorm(**plain)(x) * (1 + attend[1]) + attend[0]
        y = nn.MultiHeadDotProductAttention(2, name="attn")(y, y)
        x = x + attend[2] * nn.Dropout(0.1, deterministic=not train)(y)
        y = nn.LayerNorm(**plain)(x) * (1 + scale) + shift
        return x + gate * nn.Dense(D, name="fc")(y)


class Transformer(nn.Module):
    """DiT's shape: patches, positions, a condition that shifts and scales."""

    @nn.compact
    def __call__(self, x, train=False):
        condition = nn.Embed(3, D, name="classes")(jnp.arange(len(x)) % 3)[:, None]
        x = nn.Conv(D, (2, 2), (2, 2), name="patches")(x).reshape(len(x), -1, D)
        x = x + self.param("pos_embed", NORMAL, (1, x.shape[1], D))
        block = nn.remat(AdaptiveBlock, static_argnums=(3,))
        x = block(name="block")(x, condition, train)
        return nn.Dense(CLASSES, name="head")(x.mean(1))


class PooledBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.Dense(D, name="fc")(nn.LayerNorm()(x))
        y = nn.Dropout(0.2, deterministic=not train)(nn.gelu(y))
        scale = self.param("layer_scale", nn.initializers.constant(0.5), (D,))
        return x + scale * y, None


class Pooled(nn.Module):
    """big_vision's shape: scanned blocks, positions, a probe that attends."""

    @nn.compact
    def __call__(self, x, train=False):
        x = x + self.param("pos_embedding", NORMAL, (1, T, D))
        x, _ = nn.scan(
            PooledBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=2,
        )(name="blocks")(x, train)
        probe = jnp.tile(self.param("probe", NORMAL, (1, 1, D)), (len(x), 1, 1))
        pool = nn.MultiHeadDotProductAttention(2, name="pool")
        return nn.Dense(CLASSES, name="head")(pool(probe, x)[:, 0])


class Relative(nn.Module):
    """A table of biases, read by one-hot rows."""

    @nn.compact
    def __call__(self, length):
        distance = jnp.arange(length)[:, None] - jnp.arange(length) + length - 1
        table = self.param("rel_embedding", NORMAL, (HEADS, 2 * length - 1))
        return jnp.einsum("hr,qkr->hqk", table, nn.one_hot(distance, 2 * length - 1))


class Biased(nn.Module):
    """T5's shape: relative positions, no biases, a head that is the table."""

    @nn.compact
    def __call__(self, ids, train=False):
        embed = nn.Embed(11, D, name="embed", embedding_init=NORMAL)
        x = embed(ids)
        q, k, v = (Einsum((D, HEADS * SIZE), name=n)("btd,de->bte", x) for n in "qkv")
        q, k, v = (y.reshape(*x.shape[:2], HEADS, SIZE) for y in (q, k, v))
        bias = Relative(name="relative")(T)
        y = nn.dot_product_attention(q, k, v, bias=bias).reshape(x.shape)
        x = x + nn.Dense(D, use_bias=False, name="o")(y)
        x = RMSNorm(name="head")(x)
        logits = nn.Dense(11, use_bias=False, parent=None)
        params = {"kernel": embed.embedding.T}
        return logits.apply({"params": params}, x)[..., :CLASSES].mean(1)


class ConvNorm(nn.Conv):
    """Normalises what it makes, and says how large it is."""

    @nn.compact
    def __call__(self, x, train):
        y = nn.BatchNorm(use_running_average=not train, name="bn")(super().__call__(x))
        self.sow("intermediates", "size", jnp.abs(y).mean())
        return {"y": nn.relu(y), "mean": y.mean()}


class Residual(nn.Module):
    """A ResNet's shape; a head whose weight is normalised, which stays as it is."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(D, (2, 2), name="stem")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        found = ConvNorm(D, (3, 3), name="conv")(x, train)
        x = (x + found["y"]).mean((1, 2)) + found["mean"]
        x = nn.WeightNorm(nn.Dense(D, name="normed"))(x)
        return nn.Dense(CLASSES, name="head")(x)


@dataclasses.dataclass(frozen=True)
class Member:
    """A model of the zoo.

    Attributes:
      module: takes eight examples, and whether they are to train on.
      inputs: the examples.
      targets: regex.
      place: for every adapted weight by its name in the parameters, the weight's update
        from those of its matrices `[*lead, n, m]`.
      layouts: of own weights.
    """

    module: nn.Module
    inputs: jax.Array
    targets: str
    place: Mapping[str, Callable]
    layouts: Mapping[str, Layout] = dataclasses.field(default_factory=dict)


def same(deltas: Any) -> Any:
    return deltas


def heads(deltas: Any) -> Any:
    """`[..., D, H * k]` with the heads apart."""
    return deltas.reshape(*deltas.shape[:-1], 2, D // 2)


def joins(deltas: Any) -> Any:
    """`[..., H * k, D]` with the heads apart."""
    return deltas.reshape(*deltas.shape[:-2], 2, D // 2, D)


def behind(deltas: Any) -> Any:
    """`[L, n, m]` with the layers behind the inputs."""
    return deltas.swapaxes(0, 1)


def attention(path: str) -> dict[str, Callable]:
    ends = {"query": heads, "key": heads, "value": heads, "out": joins}
    return {f"{path}/{name}/kernel": place for name, place in ends.items()}


ZOO = {
    "decoder": Member(
        Decoder(),
        IDS,
        ".*",
        {
            "attn/q_einsum/w": same,
            "attn/kv_einsum/w": same,
            "attn/attn_vec_einsum/w": lambda d: d.reshape(HEADS, SIZE, D),
            "mlp/gating_einsum": same,
            "mlp/linear": same,
        },
        {
            ".*/q_einsum/w": Layout((D,), (SIZE,), (HEADS,)),
            ".*/kv_einsum/w": Layout((D,), (SIZE,), (2, KV)),
            ".*/attn_vec_einsum/w": Layout((HEADS, SIZE), (D,)),
            "mlp/gating_einsum": Layout((D,), (12,), (2,)),
            "mlp/linear": Layout((12,), (D,)),
        },
    ),
    "scan_axis_1": Member(
        Scanned(),
        TOKENS,
        "layers/.*",
        {"layers/wi/kernel": behind, "layers/wo/kernel": behind},
        {"layers/wi": Layout((D,), (D,))},
    ),
    "adaptive_norm": Member(
        Transformer(),
        IMAGES,
        "patches|block/.*",
        {
            "patches/kernel": lambda d: d.reshape(2, 2, 2, D),
            "block/modulation/kernel": same,
            "block/fc/kernel": same,
        }
        | attention("block/attn"),
    ),
    "pooled": Member(
        Pooled(),
        TOKENS,
        "(?!head).*",
        {"blocks/fc/kernel": same} | attention("pool"),
    ),
    "tied_head": Member(
        Biased(),
        IDS,
        ".*",
        {f"{n}/w": same for n in "qkv"} | {"o/kernel": same},
        {"[qkv]/w": Layout((D,), (HEADS * SIZE,))},
    ),
    "batch_norm": Member(
        Residual(),
        IMAGES,
        "stem|conv.*",
        {
            "stem/kernel": lambda d: d.reshape(2, 2, 2, D),
            "conv/kernel": lambda d: d.reshape(3, 3, D, D),
        },
    ),
}
