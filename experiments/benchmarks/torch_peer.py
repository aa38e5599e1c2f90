"""Hugging Face PEFT's LoRA on a ViT in PyTorch, to compare with."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.workload import CLASSES, Setting
from snella_jax.models import vit

# query, key, value, out, fc1 and fc2 as transformers calls them (version 4 and 5)
TARGETS = (
    r".*\.(query|key|value|output\.dense|intermediate\.dense|"
    r"q_proj|k_proj|v_proj|o_proj|fc1|fc2)"
)


def lora(setting: Setting) -> tuple[dict[str, Any], Callable[[], None]]:
    """Returns the row of a result, and a function that runs one training step.

    The ViT is that of `setting`, initialised at random; the step computes under
    autocast if `setting.dtype` is bfloat16.

    Raises:
      ValueError: the frozen weights are bfloat16 and the computation is not, or the
        model is not a ViT or has LayerScale.
      ModuleNotFoundError: torch, transformers or peft is not installed.
    """
    c = _config(setting)
    import peft
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _model(setting, c).to(device).train()
    frozen_dtype = getattr(torch, setting.frozen_dtype)
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(frozen_dtype)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    images = torch.randn(setting.batch, c.channels, *c.image_hw, device=device)
    labels = torch.arange(setting.batch, device=device) % CLASSES
    dtype = getattr(torch, setting.dtype)

    def take() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    row = dataclasses.asdict(setting) | {
        "method": "lora in torch (peft)",
        "sketch": 1,
        "path": None,
        "compile_seconds": 0.0,
        "trainable": sum(weight.numel() for weight in trained),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
    }
    return row, take


def _config(setting: Setting) -> vit.ViTConfig:
    """Returns the config of the model of `setting`; raises as `lora` does."""
    names = ("torch", "transformers", "peft")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"--peer torch needs {', '.join(missing)}: pip install {' '.join(missing)}"
        )
    if setting.frozen_dtype != setting.dtype == "float32":
        raise ValueError(
            "--peer torch cannot mix float32 with bfloat16 frozen weights."
        )
    config = vit.PRESETS.get(setting.model)
    if config is None or config.layer_scale is not None:
        raise ValueError(
            f"--peer torch has ViTs without LayerScale: no {setting.model}."
        )
    return config


def _model(setting: Setting, c: vit.ViTConfig) -> Any:
    """Returns the ViT in PyTorch, with LoRA beside its linear layers."""
    import peft
    import transformers

    architecture = transformers.ViTConfig(
        hidden_size=c.width,
        num_hidden_layers=c.depth,
        num_attention_heads=c.heads,
        intermediate_size=c.mlp_dim or 4 * c.width,
        image_size=c.image_hw[0],
        patch_size=c.patch_hw[0],
        num_labels=CLASSES,
    )
    adapters = peft.LoraConfig(
        r=setting.rank,
        lora_alpha=setting.rank,
        target_modules=TARGETS,
        modules_to_save=["classifier"],
    )
    base = transformers.ViTForImageClassification(architecture)
    return peft.get_peft_model(base, adapters)
