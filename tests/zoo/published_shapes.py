"""Small models with the structure and the parameter names of published repositories."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

L, D, H, K, S, F, CLASSES = 2, 8, 4, 2, 2, 12, 3
TOKENS = jax.random.normal(jax.random.key(7), (4, 3, D))
NORMAL = nn.initializers.normal(0.3)


def attended(q, k, v):
    """Attention `[B, T, H, S]`; heads share keys where these are fewer."""
    return jax.nn.dot_product_attention(q, k, v)


class BonsaiLayer(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(H, D, decode=False, rngs=rngs)
        self.linear1 = nnx.Linear(D, F, rngs=rngs)
        self.linear2 = nnx.Linear(F, D, rngs=rngs)
        self.layernorm_before = nnx.LayerNorm(D, rngs=rngs)
        self.layernorm_after = nnx.LayerNorm(D, rngs=rngs)
        self.dropout = nnx.Dropout(0.0, deterministic=False)

    def __call__(self, x, *, rngs):
        x = x + self.attention(self.layernorm_before(x), rngs=rngs)
        y = self.linear2(jax.nn.gelu(self.linear1(self.layernorm_after(x))))
        return x + self.dropout(y, rngs=rngs)


class Bonsai(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([BonsaiLayer(rngs)])
        self.ln = nnx.LayerNorm(D, rngs=rngs)
        self.classifier = nnx.Linear(D, CLASSES, rngs=rngs)

    def __call__(self, x, *, rngs):
        for layer in self.layers:
            x = layer(x, rngs=rngs)
        return self.classifier(self.ln(x)[:, 0])


class BigVision(nn.Module):
    """Of its encoder, what the ViT of tests/linen/test_linen.py does not have."""

    @nn.compact
    def __call__(self, image, *, train=False):
        x = Transformer(name="Transformer")(image)
        return nn.Dense(CLASSES, name="head")(x.mean(1)), {"encoded": x}


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return EncoderBlock(name="encoderblock_0")(x)


class EncoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=H)(y, y)
        return x + MlpBlock()(nn.LayerNorm()(x))


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D)(nn.gelu(nn.Dense(F)(x)))


class TunixEinsum(nnx.Module):
    def __init__(self, einsum_str, shape, rngs):
        self.einsum_str, self.shape = einsum_str, shape
        self.w = nnx.Param(0.3 * jax.random.normal(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


class TunixAttention(nnx.Module):
    def __init__(self, rngs):
        self.q_proj = TunixEinsum("BTD,DNH->BTNH", (D, H, S), rngs)
        self.k_proj = TunixEinsum("BSD,DKH->BSKH", (D, K, S), rngs)
        self.v_proj = TunixEinsum("BSD,DKH->BSKH", (D, K, S), rngs)
        self.o_proj = TunixEinsum("BTNH,NHD->BTD", (H, S, D), rngs)

    def __call__(self, x):
        return self.o_proj(attended(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class TunixMLP(nnx.Module):
    def __init__(self, rngs):
        self.gate_proj = nnx.Linear(D, F, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(D, F, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(F, D, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class TunixLayer(nnx.Module):
    def __init__(self, rngs):
        self.attn, self.mlp = TunixAttention(rngs), TunixMLP(rngs)

    def __call__(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class Tunix(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([TunixLayer(rngs)])
        self.lm_head = TunixEinsum("BTD,DV->BTV", (D, CLASSES), rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


class PiEinsum(nn.Module):
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("w", NORMAL, self.shape))


class PiAttention(nn.Module):
    """Tokens of two experts attend to each other."""

    @nn.compact
    def __call__(self, xs):
        parts = []
        for end, x in zip(("", "_1"), xs, strict=True):
            width = x.shape[-1]
            q = PiEinsum((H, width, S), name=f"q_einsum{end}")("BTD,NDH->BTNH", x)
            kv_einsum = PiEinsum((2, K, width, S), name=f"kv_einsum{end}")
            parts.append((q, *kv_einsum("BSD,2KDH->2BSKH", x)))
        y = attended(*(jnp.concatenate(part, 1) for part in zip(*parts, strict=True)))
        ys, before = [], 0
        for end, x in zip(("", "_1"), xs, strict=True):
            own, before = y[:, before : before + x.shape[1]], before + x.shape[1]
            out = PiEinsum((H, S, x.shape[-1]), name=f"attn_vec_einsum{end}")
            ys.append(out("BTNH,NHD->BTD", own))
        return ys


class PiFeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):
        up = self.param("gating_einsum", NORMAL, (2, x.shape[-1], F))
        down = self.param("linear", NORMAL, (F, x.shape[-1]))
        return (nn.gelu(x @ up[0]) * (x @ up[1])) @ down


class PiBlock(nn.Module):
    @nn.compact
    def __call__(self, xs, _):
        ys = PiAttention(name="attn")(xs)
        xs = [x + y for x, y in zip(xs, ys, strict=True)]
        ends = zip(("", "_1"), xs, strict=True)
        return [x + PiFeedForward(name=f"mlp{end}")(x) for end, x in ends], None


class PiLanguageModel(nn.Module):
    @nn.compact
    def __call__(self, xs):
        scan = nn.scan(
            PiBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=L,
        )
        return scan(name="layers")(xs, None)[0]


class Pi(nnx.Module):
    """openpi's: a Linen module of two experts in an NNX model."""

    def __init__(self, rngs):
        llm = nnx.bridge.ToNNX(PiLanguageModel(), rngs=rngs)
        llm.lazy_init([TOKENS, TOKENS])
        self.PaliGemma = nnx.Dict(llm=llm)
        self.action_in_proj = nnx.Linear(D, D, rngs=rngs)
        self.action_out_proj = nnx.Linear(D, CLASSES, rngs=rngs)

    def __call__(self, x):
        _, actions = self.PaliGemma.llm([x, self.action_in_proj(x)])
        return self.action_out_proj(actions)


class MaxTextDense(nnx.Module):
    """Contracts as many axes at the end as its weight has inputs."""

    def __init__(self, inputs, outputs, *, rngs):
        self.inputs = inputs
        self.kernel = nnx.Param(NORMAL(rngs.params(), (*inputs, *outputs)))

    def __call__(self, x):
        return jnp.tensordot(x, self.kernel[...], len(self.inputs))


def dense(inputs, outputs, name):
    return nnx.bridge.to_linen(MaxTextDense, inputs, outputs, name=name)


class MaxTextAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = {"query": H, "key": K, "value": K}
        q, k, v = (dense((D,), (n, S), name)(x) for name, n in heads.items())
        return dense((H, S), (D,), "out")(attended(q, k, v))


class MaxTextMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate, up = (dense((D,), (F,), name)(x) for name in ("wi_0", "wi_1"))
        return dense((F,), (D,), "wo")(nn.silu(gate) * up)


class MaxTextLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + MaxTextAttention(name="self_attention")(x)
        return x + MaxTextMLP(name="mlp")(x), None


class MaxTextDecoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            MaxTextLayer,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=L,
        )
        return scan(name="layers")(x, None)[0]


class MaxText(nn.Module):
    @nn.compact
    def __call__(self, x):
        return MaxTextDecoder(name="decoder")(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class EquinoxLinear:
    """A module that is a pytree, with a weight `[out, in]`."""

    weight: Any
    bias: Any
    in_features: int = dataclasses.field(metadata={"static": True})
    out_features: int = dataclasses.field(metadata={"static": True})

    def __call__(self, x):
        return self.weight @ x + self.bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class EquinoxMLP:
    layers: tuple[EquinoxLinear, ...]

    def __call__(self, x):
        *hidden, last = self.layers
        for layer in hidden:
            x = jax.nn.relu(layer(x))
        return last(x)


def equinox_mlp():
    sizes = [(D, F), (F, D), (D, CLASSES)]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return EquinoxMLP(
        tuple(
            EquinoxLinear(jax.random.normal(key, (m, n)) / n, jnp.zeros(m), n, m)
            for key, (n, m) in zip(keys, sizes, strict=True)
        )
    )


def haiku_params():
    layers = [{"w": layer.weight.T, "b": layer.bias} for layer in equinox_mlp().layers]
    return {f"mlp/~/linear_{i}": layer for i, layer in enumerate(layers)}


def haiku_apply(params, _, x):
    for i in range(3):
        layer = params[f"mlp/~/linear_{i}"]
        x = x @ layer["w"] + layer["b"]
        x = jax.nn.relu(x) if i < 2 else x
    return x
