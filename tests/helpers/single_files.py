"""Single files of Stable Diffusion 3, made of folders of its components."""

import re

VAE, T5 = "first_stage_model.", "text_encoders.t5xxl.transformer."
# Stability's names of an autoencoder's parts, by diffusers'.
VAE_NAMES = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"group_norm": "norm",
    r"to_([qkv])": r"\1",
    r"to_out\.0": "proj_out",
    r"down_blocks\.(\d+)\.resnets": r"down.\1.block",
    r"down_blocks\.(\d+)\.downsamplers\.0": r"down.\1.downsample",
}


def of_stability(tensors, levels):
    """Returns an autoencoder's tensors by Stability's names, without the prefix.

    The decoder's levels are counted the other way round there, and attention's
    matrices are kernels of 1 x 1.
    """
    found = {}
    for name, tensor in tensors.items():
        for theirs, stabilitys in VAE_NAMES.items():
            name = re.sub(rf"\b{theirs}\b", stabilitys, name)
        if match := re.match(r"decoder\.up_blocks\.(\d+)\.", name):
            rest = name[match.end() :]
            rest = rest.replace("resnets", "block").replace("upsamplers.0", "upsample")
            name = f"decoder.up.{levels - 1 - int(match[1])}.{rest}"
        square = ".attn_1." in name and tensor.ndim == 2
        found[name] = tensor[:, :, None, None] if square else tensor
    return found


def prefixed(tensors, prefix):
    """Returns tensors as they are called in a single file."""
    return {prefix + name: tensor for name, tensor in tensors.items()}
