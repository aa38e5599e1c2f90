"""Makes the files beside it: `pip install torch transformers`, `python make.py`.

A ViT and a DINOv2 of transformers with random weights, the first also in the formats of
MAE, of MoCo v3 and of the original `.npz`, and what they compute (`expected.npz`).
"""

import collections
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

HERE = Path(__file__).parent
SHAPE = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 20,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
}


def randomised(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def timm_names(state):
    """The state dict of a `ViTForImageClassification` as timm names it, fused qkv."""
    out = collections.OrderedDict()
    for name, to in (("cls_token", "cls_token"), ("position_embeddings", "pos_embed")):
        out[to] = state[f"vit.embeddings.{name}"]
    linears = {"attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1"}
    linears |= {"output.dense": "mlp.fc2"}
    norms = {"layernorm_before": "norm1", "layernorm_after": "norm2"}
    for kind in ("weight", "bias"):
        patches = state[f"vit.embeddings.patch_embeddings.projection.{kind}"]
        out[f"patch_embed.proj.{kind}"] = patches
        for i in range(SHAPE["num_hidden_layers"]):
            old, new = f"vit.encoder.layer.{i}", f"blocks.{i}"
            out[f"{new}.attn.qkv.{kind}"] = torch.cat([
                state[f"{old}.attention.attention.{name}.{kind}"]
                for name in ("query", "key", "value")
            ])  # fmt: skip
            for theirs, ours in (linears | norms).items():
                out[f"{new}.{ours}.{kind}"] = state[f"{old}.{theirs}.{kind}"]
        out[f"norm.{kind}"] = state[f"vit.layernorm.{kind}"]
        out[f"head.{kind}"] = state[f"classifier.{kind}"]
    return out


def npz_names(timm):
    """timm's tensors as the original `.npz` has them."""
    t = {name: tensor.numpy() for name, tensor in timm.items()}
    out = {
        "cls": t["cls_token"],
        "Transformer/posembed_input/pos_embedding": t["pos_embed"],
        "embedding/kernel": t["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": t["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": t["norm.weight"],
        "Transformer/encoder_norm/bias": t["norm.bias"],
        "head/kernel": t["head.weight"].T,
        "head/bias": t["head.bias"],
    }
    for i in range(SHAPE["num_hidden_layers"]):
        new, old = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        for ours, theirs in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            out[f"{new}/{ours}/scale"] = t[f"{old}.{theirs}.weight"]
            out[f"{new}/{ours}/bias"] = t[f"{old}.{theirs}.bias"]
        for ours, theirs in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            out[f"{new}/MlpBlock_3/{ours}/kernel"] = t[f"{old}.mlp.{theirs}.weight"].T
            out[f"{new}/MlpBlock_3/{ours}/bias"] = t[f"{old}.mlp.{theirs}.bias"]
        attention = f"{new}/MultiHeadDotProductAttention_1"
        weights = np.split(t[f"{old}.attn.qkv.weight"], 3)
        biases = np.split(t[f"{old}.attn.qkv.bias"], 3)
        for name, weight, bias in zip(
            ("query", "key", "value"), weights, biases, strict=True
        ):
            out[f"{attention}/{name}/kernel"] = weight.T.reshape(12, 2, 6)
            out[f"{attention}/{name}/bias"] = bias.reshape(2, 6)
        out[f"{attention}/out/kernel"] = t[f"{old}.attn.proj.weight"].T.reshape(
            2, 6, 12
        )
        out[f"{attention}/out/bias"] = t[f"{old}.attn.proj.bias"]
    return out


def main():
    vit = randomised(
        transformers.ViTForImageClassification(
            transformers.ViTConfig(**SHAPE, intermediate_size=24, num_labels=3)
        )
    )
    pooled = transformers.ViTModel(vit.config)
    pooled.load_state_dict(vit.vit.state_dict(), strict=False)
    dinov2 = randomised(
        transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE, mlp_ratio=2))
    )
    for model, name in ((vit, "classifier"), (pooled, "pooled"), (dinov2, "dinov2")):
        model.save_pretrained(HERE / name)
    # As saved: transformers 5 names them otherwise in memory.
    timm = timm_names(load_file(HERE / "classifier" / "model.safetensors"))
    backbone = {name: t for name, t in timm.items() if not name.startswith("head")}
    torch.save({"model": backbone}, HERE / "mae.pth")
    moco = {f"module.{name}": tensor for name, tensor in timm.items()}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1, momentum=0.9)
    saved = {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": moco,
        "best": np.float64(1),
    }
    torch.save(saved | {"optimizer": optimizer.state_dict()}, HERE / "moco.pth.tar")
    np.savez(HERE / "original.npz", **npz_names(timm))

    images, large = torch.randn(2, 3, 20, 20), torch.randn(1, 3, 28, 24)
    expected = {"images": images, "large": large}
    with torch.no_grad():
        out = vit(images, output_hidden_states=True)
        expected |= {"logits": out.logits, "layer_1": out.hidden_states[2]}
        expected["tokens"] = vit.vit(images).last_hidden_state
        expected["dinov2_tokens"] = dinov2(images).last_hidden_state
        expected["dinov2_large"] = dinov2(large).last_hidden_state
    arrays = {name: tensor.numpy() for name, tensor in expected.items()}
    for name in ("images", "large"):
        arrays[name] = arrays[name].transpose(0, 2, 3, 1)
    np.savez(HERE / "expected.npz", **arrays)


if __name__ == "__main__":
    main()
