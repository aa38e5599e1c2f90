"""CLIP's towers against transformers, from files that PyTorch wrote."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from snella_jax.models.sd3 import clip

pytestmark = pytest.mark.reference
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 56,
    "projection_dim": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 97,
}
IMAGE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
}
TOKENS = np.random.default_rng(0).integers(1, 97, (3, 16))
TOKENS[:, 0], TOKENS[0, 5:], TOKENS[1, 9:], TOKENS[2, 15] = 97, 98, 0, 98
TOKENS[1, 8] = 98
IMAGES = np.random.default_rng(1).normal(size=(2, 28, 28, 3)).astype(np.float32)
BLOCK = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
         "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
TOP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    "logit_scale": "logit_scale",
}


@pytest.fixture(scope="module")
def torch():
    module = pytest.importorskip("torch")
    module.manual_seed(0)
    return module


def redrawn(torch, model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 1 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.3
            parameter.normal_(0, spread)
            if re.search(r"norm\w*\.weight$", name):
                parameter += 1
    return model.eval()


def near(found, expected):
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def check_text(tower, oracle, torch):
    hidden, pooled = tower(jnp.asarray(TOKENS))
    expected = oracle(torch.tensor(TOKENS), output_hidden_states=True)
    near(hidden, expected.hidden_states[-2])
    near(pooled, expected.text_embeds)


@pytest.mark.parametrize(("eos", "activation"), [(98, "quick_gelu"), (2, "gelu")])
def test_texts(eos, activation, torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    own = {"eos_token_id": eos, "hidden_act": activation}
    config = transformers.CLIPTextConfig(**TEXT, **own)
    oracle = redrawn(torch, transformers.CLIPTextModelWithProjection(config))
    oracle.save_pretrained(tmp_path / "folder")
    tower = clip.load(tmp_path / "folder")
    check_text(tower, oracle, torch)

    prefix = "text_encoders.clip_g.transformer."
    tensors = {f"{prefix}{n}": t.numpy() for n, t in oracle.state_dict().items()}
    save_file(tensors, tmp_path / "sd3.safetensors")
    known = {"heads": 4, "activation": activation}
    single = clip.load(tmp_path / "sd3.safetensors", part="clip_g", **known)
    for found, expected in zip(
        single(jnp.asarray(TOKENS)), tower(jnp.asarray(TOKENS)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_texts_without_a_projection(torch, tmp_path):
    """Whatever names this version of transformers gives them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(**TEXT, eos_token_id=98)
    oracle = redrawn(torch, transformers.CLIPTextModel(config))
    oracle.save_pretrained(tmp_path)
    hidden, pooled = clip.load(tmp_path)(jnp.asarray(TOKENS))
    expected = oracle(torch.tensor(TOKENS), output_hidden_states=True)
    near(hidden, expected.hidden_states[-2])
    near(pooled, expected.pooler_output)


@pytest.fixture(scope="module")
def whole(torch):
    transformers = pytest.importorskip("transformers")
    text = {**TEXT, "eos_token_id": 98}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=IMAGE, projection_dim=24
    )
    return redrawn(torch, transformers.CLIPModel(config))


def test_texts_and_images(whole, torch, tmp_path):
    whole.save_pretrained(tmp_path)
    check_whole(clip.load(tmp_path), clip.load_image(tmp_path), whole, torch)


def test_images_alone(torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(**IMAGE, projection_dim=20)
    oracle = redrawn(torch, transformers.CLIPVisionModelWithProjection(config))
    oracle.save_pretrained(tmp_path)
    pixels = torch.tensor(IMAGES.transpose(0, 3, 1, 2))
    near(clip.load_image(tmp_path)(IMAGES), oracle(pixels).image_embeds)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_an_archive_of_torchscript(whole, torch, tmp_path):
    """OpenAI's names and format, written by PyTorch from the same numbers."""
    tensors = openai(whole.state_dict(), torch)
    tensors["input_resolution"] = torch.tensor(28)
    torch.jit.script(nested(torch, tensors)).save(str(tmp_path / "clip.pt"))
    text = clip.load(tmp_path / "clip.pt", heads=4)
    image = clip.load_image(tmp_path / "clip.pt", heads=3)
    check_whole(text, image, whole, torch)


def check_whole(text, image, oracle, torch):
    _, pooled = text(jnp.asarray(TOKENS))
    expected = oracle.get_text_features(torch.tensor(TOKENS)).pooler_output
    near(pooled, expected)
    pixels = torch.tensor(IMAGES.transpose(0, 3, 1, 2))
    near(image(IMAGES), oracle.get_image_features(pixels).pooler_output)


def openai(tensors, torch):
    """Renames and joins the tensors of a `CLIPModel`."""
    found, fused = {}, {}
    for name, tensor in tensors.items():
        top = next((t for t in TOP if name.startswith(t)), None)
        if top is not None:
            turned = tensor.T if "projection" in name else tensor
            found[name.replace(top, TOP[top])] = turned.contiguous()
            continue
        match = re.fullmatch(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.*)", name)
        tower, index, rest = match.groups()
        start = "visual." if tower == "vision" else ""
        start += f"transformer.resblocks.{index}."
        if part := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", rest):
            key = f"{start}attn.in_proj_{part[2]}"
            fused.setdefault(key, {})[part[1]] = tensor
        else:
            layer, leaf = rest.rsplit(".", 1)
            found[f"{start}{BLOCK[layer]}.{leaf}"] = tensor
    found |= {key: torch.cat([own[x] for x in "qkv"]) for key, own in fused.items()}
    return found


def nested(torch, tensors):
    """Returns a module with these tensors, in modules by the parts of their names."""

    class Holder(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    made, inner = Holder(), {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if rest:
            inner.setdefault(first, {})[rest] = tensor
        elif tensor.is_floating_point():
            made.register_parameter(first, torch.nn.Parameter(tensor))
        else:
            made.register_buffer(first, tensor)
    for name, own in inner.items():
        made.add_module(name, nested(torch, own))
    return made
