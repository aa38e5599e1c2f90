"""The MMDiT in float64 NumPy, from a single file's tensors: query by query."""

import math

import numpy as np


def velocity(tensors, latents, timestep, context, pooled, heads, patch=2):
    """Follows Stability AI's description; `[B, h, w, C]` to `[B, h, w, C]`."""
    w = {name: np.float64(value) for name, value in tensors.items()}
    latents, context, pooled = map(np.float64, (latents, context, pooled))
    batch, height, width, channels = latents.shape
    rows, columns = height // patch, width // patch
    x = np.zeros((batch, rows * columns, len(w["x_embedder.proj.bias"])))
    side = math.isqrt(w["pos_embed"].shape[1])
    top, left = (side - rows) // 2, (side - columns) // 2
    for b, i, j in np.ndindex(batch, rows, columns):
        piece = latents[b, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
        own = np.einsum("hwc,dchw->d", piece, w["x_embedder.proj.weight"])
        place = w["pos_embed"][0, (top + i) * side + left + j]
        x[b, i * columns + j] = own + w["x_embedder.proj.bias"] + place
    c = linear(w, "context_embedder", context)
    # float32, as every program has them: the angles are large
    t = np.float32(timestep)[:, None]
    angles = t * np.exp(np.float32(-math.log(10000) / 128) * np.arange(128, dtype="f4"))
    waves = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    y = silu(mlp(w, "t_embedder.mlp", waves) + mlp(w, "y_embedder.mlp", pooled))
    depth = len({name.split(".")[1] for name in w if name.startswith("joint_blocks")})
    for i in range(depth):
        x, c = block(under(w, f"joint_blocks.{i}."), x, c, y, heads, i == depth - 1)
    shift, scale = np.split(linear(w, "final_layer.adaLN_modulation.1", y), 2, 1)
    x = linear(w, "final_layer.linear", modulated(x, shift, scale))
    out = np.zeros((batch, height, width, channels))
    for b, i, j in np.ndindex(batch, rows, columns):
        piece = x[b, i * columns + j].reshape(patch, patch, channels)
        out[b, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = piece
    return out


def block(w, x, c, y, heads, last):
    of_x, of_c = (
        np.split(linear(w, f"{name}.adaLN_modulation.1", y), count, 1)
        for name, count in (("x_block", 6), ("context_block", 2 if last else 6))
    )
    qkv = [
        linear(w, f"{name}.attn.qkv", modulated(own, *parts[:2]))
        for name, own, parts in (("x_block", x, of_x), ("context_block", c, of_c))
    ]
    found = attention(*np.split(np.concatenate(qkv, 1), 3, 2), heads)
    patches = x.shape[1]
    x = after(under(w, "x_block."), x, found[:, :patches], of_x)
    if not last:
        c = after(under(w, "context_block."), c, found[:, patches:], of_c)
    return x, c


def after(w, x, found, parts):
    _, _, gate, shift, scale, mlp_gate = parts
    x = x + gate[:, None] * linear(w, "attn.proj", found)
    hidden = linear(w, "mlp.fc1", modulated(x, shift, scale))
    inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
    hidden = hidden * (1 + np.tanh(inner)) / 2
    return x + mlp_gate[:, None] * linear(w, "mlp.fc2", hidden)


def attention(q, k, v, heads):
    q, k, v = (one.reshape(*one.shape[:2], heads, -1) for one in (q, k, v))
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(*q.shape[:3]):
        logits = k[b, :, h] @ q[b, i, h] / math.sqrt(q.shape[-1])
        shares = np.exp(logits - logits.max())
        out[b, i, h] = shares @ v[b, :, h] / shares.sum()
    return out.reshape(*out.shape[:2], -1)


def modulated(x, shift, scale):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return normed * (1 + scale[:, None]) + shift[:, None]


def mlp(w, name, x):
    return linear(w, f"{name}.2", silu(linear(w, f"{name}.0", x)))


def silu(x):
    return x / (1 + np.exp(-x))


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def under(w, start):
    return {n.removeprefix(start): v for n, v in w.items() if n.startswith(start)}
