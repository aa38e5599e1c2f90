"""LoRA in PEFT's files: the outputs of PEFT on tiny models of transformers, diffusers.

Every factor, and all that is trained whole, is drawn anew.
"""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mmdit_files import INPUTS
from peft_files import LORA, redrawn
from places import ASSETS, ROOT

import snella_jax as snella
from snella_jax import models
from snella_jax.models.checkpoints.read import read

pytestmark = [
    pytest.mark.reference,
    # Of transformers about itself, when PEFT asks.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
PIXELS = np.random.default_rng(0).normal(size=(2, 80, 80, 3)).astype("f4")
TOKENS = np.arange(12).reshape(2, 6)
HEAD = r"head|cls_token"
CASES = {  # folder, class there, targets and what trains besides
    "vit": ("vit/classifier", "ViTForImageClassification", r"blocks/.*", HEAD),
    "dinov2": ("vit/dinov2", "Dinov2Model", r"blocks/.*/(query|out|fc2)", "norm"),
    "swin": (
        *("staged/swin", "SwinForImageClassification"),
        *(r"blocks/.*/(query|key|value|out|fc1|fc2)|down/.*", "head|norm"),
    ),
    "convnext": (
        *("staged/convnext", "ConvNextForImageClassification"),
        *(r"blocks/.*/(fc1|fc2)|down/.*|patch_embed", "head"),
    ),
    "sam": (
        *("sam/transformers", "SamModel", r"encoder/.*/(q|v|proj|fc1)"),
        "decoder|prompts/no_mask_embed",
    ),
    "llama": ("llama/llama3", "LlamaForCausalLM", r"blocks/.*", "norm|head"),
    "mmdit": (
        *("sd3/pipeline/transformer", "SD3Transformer2DModel"),
        *(r"(blocks|last)/.*(k|v|proj|fc1|modulation)|modulation|head|pooled/fc1", ""),
    ),
}


def theirs(case):
    folder, name, *_ = CASES[case]
    import diffusers
    import transformers

    kind = getattr(diffusers if case == "mmdit" else transformers, name)
    return kind.from_pretrained(ASSETS / folder).eval()


def inputs(model, case):
    if case == "mmdit":
        config = model.config
        sizes = (4, 4, config.channels), (3, config.context_dim), (config.pooled_dim,)
        rng = np.random.default_rng(1)
        latents, context, pooled = (
            rng.normal(size=(2, *s)).astype("f4") for s in sizes
        )
        return latents, INPUTS[1], context, pooled
    if case == "llama":
        return (TOKENS,)
    height, width = model.config.image_hw
    return (PIXELS[:, :height, :width],)


def ours(model, case):
    found = model(*map(jnp.asarray, inputs(model, case)))
    if case == "dinov2":
        return np.asarray(model.features(jnp.asarray(inputs(model, case)[0])))
    return np.asarray(found[0] if case == "sam" else found)


def output(model, case, base):
    import torch

    given = [torch.tensor(x) for x in inputs(base, case)]
    with torch.no_grad():
        match case:
            case "mmdit":
                x, time, context, pooled = given
                x = x.permute(0, 3, 1, 2)
                found = model(x, context, pooled, time, return_dict=False)[0]
                return found.permute(0, 2, 3, 1).numpy()
            case "llama":
                return model(input_ids=given[0]).logits.numpy()
            case "sam":
                x = given[0].permute(0, 3, 1, 2)
                return model(pixel_values=x, multimask_output=False).pred_masks.numpy()
            case _:
                found = model(pixel_values=given[0].permute(0, 3, 1, 2))
    kept = "last_hidden_state" if case == "dinov2" else "logits"
    return found[kept].numpy()


def close(got, expected, share=1e-5):
    assert (
        abs(got.reshape(expected.shape) - expected).max() <= share * abs(expected).max()
    )


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_the_saved_model_does(case, tmp_path):
    import peft

    folder, _, targets, trainable = CASES[case]
    base = models.load(ASSETS / folder)
    config = snella.SnellaConfig(
        **LORA | {"rank": 3},
        targets=targets,
        trainable=trainable,
        overrides={r".*(value|v|fc1|fc2)": {"rank": 2}},
    )
    model = redrawn(snella.adapt(base, config, rngs=nnx.Rngs(1)))
    expected, before = ours(model, case), ours(base, case)
    assert abs(expected - before).max() > 0.01 * abs(before).max()
    snella.save(model, tmp_path / "lora", format="peft", like=ASSETS / folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        loaded = peft.PeftModel.from_pretrained(theirs(case), tmp_path / "lora").eval()
    close(output(loaded, case, base), expected)
    again = snella.load_peft(base, tmp_path / "lora")
    np.testing.assert_allclose(ours(again, case), expected, rtol=1e-5, atol=1e-5)
    if case == "mmdit":
        plain = theirs(case)
        name = "pytorch_lora_weights.safetensors"
        plain.load_lora_adapter(tmp_path / "lora", "transformer", weight_name=name)
        close(output(plain, case, base), expected)


TARGETS = {
    "vit": ["q_proj", "v_proj", "fc1"],
    "dinov2": ["q_proj", "fc2"],
    "swin": ["q_proj", "o_proj", "reduction"],
    "convnext": ["pwconv1", "patch_embeddings"],
    "sam": ["qkv", "lin1"],
    "llama": ["q_proj", "k_proj", "down_proj"],
    "mmdit": ["to_q", "add_k_proj", "proj_out", "norm_out.linear"],
}
WHOLE = {"vit": ["classifier"], "sam": ["mask_decoder"], "llama": ["lm_head"]}
KINDS = {
    "lora": {"rank_pattern": {"fc1": 5, "lin1": 5, "q_proj": 2}, "lora_alpha": 7},
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "dora": {"use_dora": True, "lora_alpha": 7, "alpha_pattern": {"v_proj": 2}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_gives_its_outputs(case, kind, tmp_path):
    import peft
    import torch

    known = {
        option: {name: x for name, x in value.items() if name in TARGETS[case]}
        if isinstance(value, dict)
        else value
        for option, value in KINDS[kind].items()
    }
    options = dict(r=4, target_modules=TARGETS[case], modules_to_save=WHOLE.get(case))
    adapted = peft.get_peft_model(theirs(case), peft.LoraConfig(**options | known))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            large = 1.0 if "magnitude" in name else 0.0  # times what it is
            parameter.data = parameter.data * large + 0.2 * torch.rand_like(parameter)
    adapted.eval().save_pretrained(tmp_path / "theirs")
    base = models.load(ASSETS / CASES[case][0])
    expected = output(adapted, case, base)
    assert abs(expected - ours(base, case)).max() > 0.01 * abs(expected).max()
    close(ours(snella.merge_peft(base, tmp_path / "theirs"), case), expected)
    if kind == "dora":
        with pytest.raises(snella.CheckpointError, match=r"snella\.merge_peft"):
            snella.load_peft(base, tmp_path / "theirs")
        return
    model = snella.load_peft(base, tmp_path / "theirs")
    close(ours(model, case), expected)
    snella.save(model, tmp_path / "ours", format="peft", like=ASSETS / CASES[case][0])
    again = peft.PeftModel.from_pretrained(theirs(case), tmp_path / "ours").eval()
    close(output(again, case, base), expected)


def test_a_loaded_adapter_trains_on_as_in_peft(tmp_path):
    """Gradients of both factors are those of PyTorch, with a scale of 1."""
    import peft
    import torch

    adapted = peft.get_peft_model(
        theirs("llama"),
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "up_proj"]),
    )
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.rand_like(parameter)
    adapted.save_pretrained(tmp_path / "theirs")
    adapted(input_ids=torch.tensor(TOKENS)).logits.square().mean().backward()
    base = models.load(ASSETS / CASES["llama"][0])
    model = snella.load_peft(base, tmp_path / "theirs")
    grads = nnx.grad(lambda m: jnp.square(m(jnp.asarray(TOKENS))).mean())(model)
    name = "base_model.model.model.layers.1.{}.lora_{}.default.weight"
    named = dict(adapted.named_parameters())
    for path, ours_ in (("attn/q", "self_attn.q_proj"), ("mlp/up", "mlp.up_proj")):
        first, second = path.split("/")
        own = grads["blocks"][first][second]["adapter"]
        for letter, ab in (("A", "a"), ("B", "b")):
            expected = named[name.format(ours_, letter)].grad.numpy()
            got = np.asarray(own[ab][...])[1, 0]
            close(got.T if letter == "A" else got, expected, 1e-4)
    assert set(jax.tree.map(np.shape, nnx.state(model, nnx.Param))) == {"blocks"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_documented_delta_file_is_applied_by_pytorch(dtype, tmp_path):
    """To the tensors of a file, and to a model in place, and back again."""
    import torch
    import transformers
    from safetensors.torch import load_file

    base = models.load(ASSETS / CASES["llama"][0], param_dtype=dtype)
    models.export(base, tmp_path / "base")
    model = redrawn(snella.adapt(base, snella.SnellaConfig(rank=4), rngs=nnx.Rngs(1)))
    snella.export(model, tmp_path / "merged", unmoved_budgets=True)
    files = [tmp_path / name / "model.safetensors" for name in ("base", "merged")]
    arrays = [read(file.parent).tensors for file in files]
    snella.save_delta(tmp_path / "delta.safetensors", *arrays)
    text = (ROOT / "docs/adapters.md").read_text("utf-8")
    (program,) = re.findall(r"```py\n(.*?)```", text, re.S)
    exec(program, space := {})
    before, after = map(load_file, files)
    state = {name: tensor.clone() for name, tensor in before.items()}
    for expected in (after, before):
        space["apply_delta"](state, tmp_path / "delta.safetensors")
        assert all(torch.equal(state[name], x) for name, x in expected.items())
    kind = transformers.LlamaForCausalLM
    theirs = [kind.from_pretrained(f.parent, dtype=dtype).eval() for f in files]
    space["apply_delta"](theirs[0].state_dict(), tmp_path / "delta.safetensors")
    with torch.no_grad():
        found = [model(input_ids=torch.tensor(TOKENS)).logits for model in theirs]
    assert torch.equal(*found)
