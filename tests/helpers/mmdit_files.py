"""A tiny MMDiT's tensors by diffusers' and by the single files' names, and inputs.

Written from the table of names that both programs have, not from the library's.
"""

import numpy as np

SIZES = {  # arguments of diffusers' `SD3Transformer2DModel`
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 20,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 12,
}
_RNG = np.random.default_rng(0)
INPUTS = (
    _RNG.normal(size=(2, 8, 12, 4)).astype("f4"),
    np.array([500.0, 731.25], "f4"),
    _RNG.normal(size=(2, 5, 20)).astype("f4"),
    _RNG.normal(size=(2, 12)).astype("f4"),
)
TOP = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}
QKV = {
    "x_block": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def close(got, expected):
    assert abs(got - expected).max() <= 1e-5 * abs(expected).max()


def tensors(depth=2, heads=4, width=32, seed=1):
    """Random tensors of a model by diffusers' names, all as large as in a real one."""
    rng, end = np.random.default_rng(seed), depth - 1
    shapes = {"pos_embed.pos_embed": (1, 144, width)}

    def linear(name, n, m):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (m, n), (m,)

    linear("time_text_embed.timestep_embedder.linear_1", 256, width)
    linear("time_text_embed.timestep_embedder.linear_2", width, width)
    linear("time_text_embed.text_embedder.linear_1", 12, width)
    linear("time_text_embed.text_embedder.linear_2", width, width)
    linear("context_embedder", 20, width)
    linear("norm_out.linear", width, 2 * width)
    linear("proj_out", width, 16)
    shapes |= {
        "pos_embed.proj.weight": (width, 4, 2, 2),
        "pos_embed.proj.bias": (width,),
    }
    for i in range(depth):
        start = f"transformer_blocks.{i}."
        for name in (*QKV["x_block"], *QKV["context_block"], "attn.to_out.0"):
            linear(start + name, width, width)
        linear(f"{start}ff.net.0.proj", width, 4 * width)
        linear(f"{start}ff.net.2", 4 * width, width)
        linear(f"{start}norm1.linear", width, 6 * width)
        linear(f"{start}norm1_context.linear", width, (2 if i == end else 6) * width)
        if i != end:
            linear(f"{start}attn.to_add_out", width, width)
            linear(f"{start}ff_context.net.0.proj", width, 4 * width)
            linear(f"{start}ff_context.net.2", 4 * width, width)
    return {n: (0.1 * rng.normal(size=s)).astype("f4") for n, s in shapes.items()}


def single_of(theirs):
    """The same tensors by the names of single files, without their prefix."""
    blocks = {name.split(".")[1] for name in theirs if name.startswith("transformer_")}
    last, made = str(len(blocks) - 1), {}
    for end in ("", ".weight", ".bias"):
        for name, single in TOP.items():
            if name + end in theirs:
                made[single + end] = theirs[name + end]
        for i in blocks:
            block, joint = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
            for name, single in BLOCK.items():
                if block + name + end in theirs:
                    made[joint + single + end] = theirs[block + name + end]
            for stream, names in QKV.items():
                if end:
                    three = [theirs[block + name + end] for name in names]
                    made[f"{joint}{stream}.attn.qkv{end}"] = np.concatenate(three)
    for name in (
        "final_layer.adaLN_modulation.1",
        f"joint_blocks.{last}.context_block.adaLN_modulation.1",
    ):
        for end in (".weight", ".bias"):
            scale, shift = np.split(made[name + end], 2)
            made[name + end] = np.concatenate([shift, scale])
    return made
