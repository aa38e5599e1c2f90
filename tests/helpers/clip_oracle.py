"""CLIP's towers in float64 NumPy, token by token; and tiny towers for it."""

import math

import jax
import numpy as np
from flax import nnx

from snella_jax.models.sd3 import clip

TEXT = clip.ClipTextConfig(
    width=8, depth=3, heads=2, mlp_dim=20, vocab_size=50, positions=7, projection=6
)
IMAGE = clip.ClipImageConfig(
    width=8, depth=2, heads=2, mlp_dim=20, patch_size=2, image_size=(4, 6), projection=6
)


def redrawn(model, seed=0):
    """Draws every parameter anew, so that all of them matter; returns the model."""
    rng = np.random.default_rng(seed)
    for path, variable in nnx.iter_graph(model):
        if not isinstance(variable, nnx.Param):
            continue
        shape = variable.shape
        spread = shape[-2] ** -0.5 if path[-1] == "kernel" else 0.3
        numbers = rng.normal(size=shape) * spread + (path[-1] == "scale")
        variable.set_value(jax.numpy.asarray(numbers, variable.dtype))
    return model


def text(config=TEXT, seed=0):
    return redrawn(clip.ClipText(config, rngs=nnx.Rngs(0)), seed)


def image(config=IMAGE, seed=0):
    return redrawn(clip.ClipImage(config, rngs=nnx.Rngs(0)), seed)


def parameters(model):
    """Returns float64 arrays by path; stacked blocks have a leading axis."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, p)): np.asarray(v[...], np.float64) for p, v in flat}


def text_states(model, tokens):
    """Returns the input of the last block and the state after it, of one text."""
    p, c = parameters(model), model.config
    x = p["embed/embedding"][tokens] + p["pos_embed"][: len(tokens)]
    for index in range(c.depth):
        before, x = x, block(p, index, x, c, causal=True)
    return before, norm(x, p["norm/scale"], p["norm/bias"], c.norm_eps)


def image_embedding(model, picture):
    """Returns the embedding of one normalised image."""
    p, c = parameters(model), model.config
    (height, width), (rows, columns) = c.patch_hw, c.grid
    x = [p["cls_token"]]
    for row in range(rows):
        for column in range(columns):
            patch = picture[row * height :, column * width :][:height, :width]
            x.append(np.einsum("hwc,hwcd->d", patch, p["patch_embed/kernel"]))
    x = np.stack(x) + p["pos_embed"]
    x = norm(x, p["pre_norm/scale"], p["pre_norm/bias"], c.norm_eps)
    for index in range(c.depth):
        x = block(p, index, x, c, causal=False)
    pooled = norm(x[0], p["norm/scale"], p["norm/bias"], c.norm_eps)
    return pooled @ p["projection/kernel"]


def block(p, index, x, config, causal):
    own = {
        path.removeprefix("blocks/"): value[index]
        for path, value in p.items()
        if path.startswith("blocks/")
    }

    def linear(name, x):
        return x @ own[f"{name}/kernel"] + own[f"{name}/bias"]

    y = norm(x, own["norm1/scale"], own["norm1/bias"], config.norm_eps)
    q, k, v = (linear(f"attn/{name}", y) for name in "qkv")
    d, mixed = config.width // config.heads, np.zeros_like(x)
    for head in range(config.heads):
        part = slice(head * d, (head + 1) * d)
        for t in range(len(x)):
            seen = t + 1 if causal else len(x)
            e = np.exp(k[:seen, part] @ q[t, part] / math.sqrt(d))
            mixed[t, part] = e @ v[:seen, part] / e.sum()
    x = x + linear("attn/out", mixed)
    hidden = linear("mlp/fc1", norm(x, own["norm2/scale"], own["norm2/bias"],
                                    config.norm_eps))  # fmt: skip
    if config.activation == "quick_gelu":
        hidden = hidden / (1 + np.exp(-1.702 * hidden))
    else:
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return x + linear("mlp/fc2", hidden)


def norm(x, scale, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * scale + bias
