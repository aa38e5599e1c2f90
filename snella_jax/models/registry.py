"""All families of models: presets by name, and weights of any family."""

from pathlib import Path
from typing import Any

from flax import nnx

from snella_jax.files.errors import CheckpointError
from snella_jax.models import convnext, llama, sam, swin, vit
from snella_jax.models.checkpoints.family import Family
from snella_jax.models.checkpoints.read import read
from snella_jax.models.layers import preset
from snella_jax.models.sd3 import mmdit

ImageModel = vit.ViT | swin.Swin | convnext.ConvNeXt
Model = ImageModel | sam.Sam | llama.Llama | mmdit.MMDiT
# A SAM and a Swin have the patches of a ViT, too, so they come first; so does an MMDiT,
# beside which a single file has other models.
FAMILIES = (
    mmdit.FAMILY,
    sam.FAMILY,
    swin.FAMILY,
    convnext.FAMILY,
    vit.FAMILY,
    llama.FAMILY,
)
IMAGE_PRESETS = {**vit.PRESETS, **swin.PRESETS, **convnext.PRESETS}
PRESETS = {**IMAGE_PRESETS, **sam.PRESETS, **llama.PRESETS, **mmdit.PRESETS}


def create(name: str, *, rngs: nnx.Rngs, **overrides: Any) -> Model:
    """Makes a randomly initialised preset, any field of its config overridden.

    >>> from snella_jax import models
    >>> model = nnx.eval_shape(lambda: models.create("swin_b", rngs=nnx.Rngs(0)))
    >>> model.head.kernel.shape
    (1024, 1000)

    Raises:
      ValueError: `name` is not a preset; the message has the nearest ones.
    """
    where = "snella_jax.models.PRESETS"
    return of(preset.named(name, PRESETS, "model", where, **overrides), rngs)


def of(config: Any, rngs: nnx.Rngs) -> Model:
    """Makes the randomly initialised model of a config."""
    for family in FAMILIES:
        if isinstance(config, family.config):
            return family.model(config, rngs=rngs)
    raise TypeError(f"{type(config).__name__} is the config of no model.")


def load(path: str | Path, *, weights: str | None = None, **options: Any) -> Model:
    """Loads a model with published weights: a ViT, Swin, ConvNeXt, SAM, LLaMA or MMDiT.

    Args:
      path: a file, a folder of Hugging Face's transformers or diffusers, Meta's of a
        LLaMA, or a SAM's with `encoder.onnx` and `sam.onnx`.
      weights: as in `vit.load`.
      options: others of `vit.load`, `swin.load`, `convnext.load`, `sam.load`,
        `llama.load` and `sd3.mmdit.load`.

    Raises:
      FileNotFoundError, CheckpointError, ModuleNotFoundError, ValueError, TypeError: as
        in `vit.load`.
    """
    checkpoint = read(path, weights)
    for family in FAMILIES:
        if checkpoint.prefixes(*family.marks):
            return family.load(checkpoint, **options)
    some = ", ".join(sorted(checkpoint.tensors)[:5])
    raise CheckpointError(
        checkpoint.path,
        "no ViT, Swin, ConvNeXt, SAM, LLaMA or MMDiT of a known format: expected the "
        "names of the original, of timm (ViT), of Hugging Face, of MobileSAM or of "
        f"GGUF (LLaMA), found {some} ({len(checkpoint.tensors)} in all)",
    )


def family_of(model: nnx.Module) -> Family:
    """Returns a model's family.

    Raises:
      TypeError: no model of `snella_jax.models`.
    """
    for family in FAMILIES:
        if isinstance(model, family.model):
            return family
    raise TypeError(f"{type(model).__name__} is no model of snella_jax.models.")
