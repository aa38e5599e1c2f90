"""SAM's ViT encoder in float64 NumPy, from its weights by path: query by query."""

import math

import numpy as np


def encoded(weights, images, config):
    """The output of an encoder whose blocks are lists; weights as `tiny.leaves` has."""
    w = {path: np.float64(value) for path, value in weights.items()}
    (ph, pw), (height, width) = config.patch_hw, config.grid
    patches = np.float64(images).reshape(len(images), height, ph, width, pw, -1)
    x = np.einsum("byhxwc,hwcd->byxd", patches, w["patch_embed/kernel"])
    x = x + w["patch_embed/bias"] + w["pos_embed"]
    for kind, row in config.places:
        own = under(w, f"blocks/{kind}/{row}")
        window = config.window if kind == "windowed" else None
        x = block(own, x, config.heads, window, config.norm_eps)
    return neck(under(w, "neck"), x)


def block(w, x, heads, window, eps):
    x = x + attention(under(w, "attn"), norm(under(w, "norm1"), x, eps), heads, window)
    hidden = linear(w, "mlp/fc1", norm(under(w, "norm2"), x, eps))
    erf = np.vectorize(math.erf)(hidden / math.sqrt(2))
    return x + linear(w, "mlp/fc2", hidden * (1 + erf) / 2)


def attention(w, x, heads, window):
    """Every token of a window, those beyond the grid too: their inputs are zeros."""
    batch, height, width, last = x.shape
    out = np.zeros(x.shape)
    tall, wide = (window, window) if window else (height, width)
    for b, top, left in np.ndindex(batch, -(-height // tall), -(-width // wide)):
        own = np.zeros((tall, wide, last))
        y, x0 = top * tall, left * wide
        part = x[b, y : y + tall, x0 : x0 + wide]
        own[: part.shape[0], : part.shape[1]] = part
        split = (tall, wide, heads, -1)
        q, k, v = (linear(w, name, own).reshape(split) for name in "qkv")
        tables = w["rel_pos_h"], w["rel_pos_w"]
        mixed = linear(w, "proj", biased(q, k, v, *tables).reshape(own.shape))
        out[b, y : y + tall, x0 : x0 + wide] = mixed[: part.shape[0], : part.shape[1]]
    return out


def biased(q, k, v, rows, columns):
    """Attention of one grid `[h, w, H, d]`, one query after the other."""
    q, k, v, rows, columns = map(np.float64, (q, k, v, rows, columns))
    height, width, heads, head_dim = q.shape
    out = np.zeros(q.shape)
    for y, x, head in np.ndindex(height, width, heads):
        one, logits = q[y, x, head], np.zeros((height, width))
        for i, j in np.ndindex(height, width):
            own = rows[y - i + height - 1] + columns[x - j + width - 1]
            logits[i, j] = one @ k[i, j, head] / math.sqrt(head_dim) + one @ own
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        out[y, x, head] = np.einsum("ij,ijd->d", shares, v[:, :, head])
    return out


def neck(w, x):
    x = norm(under(w, "norm1"), x @ w["conv1/kernel"][0, 0], 1e-6)
    longer = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    x = sum(
        longer[:, i : i + height, j : j + width] @ w["conv2/kernel"][i, j]
        for i, j in np.ndindex(3, 3)
    )
    return norm(under(w, "norm2"), x, 1e-6)


def linear(w, name, x):
    return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]


def norm(w, x, eps):
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return centred / deviation * w["scale"] + w["bias"]


def under(w, prefix):
    return {
        path.removeprefix(f"{prefix}/"): value
        for path, value in w.items()
        if path.startswith(f"{prefix}/")
    }
