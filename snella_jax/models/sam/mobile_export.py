"""A SAM with a TinyViT under MobileSAM's names, for its own code to load."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from snella_jax.files.arrays import Stored
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.checkpoints.rewrite import parts_of
from snella_jax.models.sam import formats
from snella_jax.models.sam.mobile_sam import BATCH_NORM_EPS
from snella_jax.models.sam.model import Sam
from snella_jax.models.sam.tiny_vit import TinyViTConfig

CLASSES = 1000  # of the classifier that TinyViT was pre-trained with
Named = Iterator[tuple[str, np.ndarray]]


def tensors(model: Sam, like: Checkpoint | None) -> dict[str, Stored]:
    """Returns a model's tensors by the names of `mobile_sam.pt`.

    Batch norms were folded into the convolutions when the weights were loaded: they are
    written as ones that change nothing. The classifier of pre-training, which is not
    used but has to be there, is 0.

    Args:
      model: plain.
      like: None, as no other file has to be known.

    Raises:
      ValueError: the encoder is a ViT, or there is a `like`.
    """
    config = model.config.encoder
    if not isinstance(config, TinyViTConfig):
        raise ValueError(
            "a SAM with a ViT is written as a folder: expected a path without .npz or "
            ".safetensors."
        )
    if like is not None:
        raise ValueError(
            f"like={like.path}: MobileSAM's names need no other file: expected None."
        )
    parts = parts_of(model, formats.stacked(model.config))
    encoder = _Encoder(parts, config)
    named: dict[str, Stored] = formats.meta_rest(parts)
    return {f"image_encoder.{name}": part for name, part in encoder.named()} | named


class _Encoder:
    """The image encoder's arrays as PyTorch has them."""

    def __init__(self, parts: Mapping[str, np.ndarray], config: TinyViTConfig):
        self.parts, self.config = parts, config

    def named(self) -> Named:
        """Yields all tensors, by name."""
        for index, name in enumerate(("seq.0", "seq.2")):
            path = f"patch_embed/conv{index + 1}"
            yield from self.convolution(f"patch_embed.{name}", path)
        for stage, depth in enumerate(self.config.depths):
            layer = f"layers.{stage}"
            for block in range(depth):
                names = f"{layer}.blocks.{block}", f"blocks/{stage}/{block}"
                yield from self.block(stage, *names)
            if stage + 1 < len(self.config.depths):
                for i in (1, 2, 3):
                    names = f"{layer}.downsample.conv{i}", f"down/{stage}/conv{i}"
                    yield from self.convolution(*names)
        for i in (1, 2):
            yield f"neck.{2 * i - 2}.weight", self.kernel(f"neck/conv{i}")
            yield from self.norm(f"neck.{2 * i - 1}", f"neck/norm{i}")
        yield from self.classifier()

    def block(self, stage: int, name: str, path: str) -> Named:
        """Yields those of a block; `qkv` goes head by head."""
        if not stage:
            for i in (1, 2, 3):
                yield from self.convolution(f"{name}.conv{i}", f"{path}/conv{i}")
            return
        yield from self.norm(f"{name}.attn.norm", f"{path}/norm1")
        heads = self.config.heads[stage - 1]
        for theirs, ours in (("weight", "kernel"), ("bias", "bias")):
            rows = [self.part(f"{path}/attn/{way}/{ours}").T for way in "qkv"]
            split = [x.reshape(heads, -1, *x.shape[1:]) for x in rows]
            fused = np.stack(split, 1).reshape(-1, *rows[0].shape[1:])
            yield f"{name}.attn.qkv.{theirs}", fused
        yield from self.linear(f"{name}.attn.proj", f"{path}/attn/proj")
        table = self.part(f"{path}/attn/bias_table")
        yield f"{name}.attn.attention_biases", table
        yield from self.convolution(f"{name}.local_conv", f"{path}/local_conv")
        yield from self.norm(f"{name}.mlp.norm", f"{path}/norm2")
        for layer in ("fc1", "fc2"):
            yield from self.linear(f"{name}.mlp.{layer}", f"{path}/mlp/{layer}")

    def convolution(self, name: str, path: str) -> Named:
        """Yields those of a convolution, and a batch norm that only adds its bias."""
        kernel, bias = self.kernel(path), self.part(f"{path}/bias")
        yield f"{name}.c.weight", kernel
        yield f"{name}.bn.weight", np.ones_like(bias)
        yield f"{name}.bn.bias", bias
        yield f"{name}.bn.running_mean", np.zeros_like(bias)
        yield f"{name}.bn.running_var", np.full_like(bias, 1 - BATCH_NORM_EPS)
        yield f"{name}.bn.num_batches_tracked", np.zeros((), np.int64)

    def classifier(self) -> Named:
        """Yields those of the classifier of pre-training."""
        width, dtype = self.config.widths[-1], self.part("neck/norm1/scale").dtype
        yield "norm_head.weight", np.ones(width, dtype)
        yield "norm_head.bias", np.zeros(width, dtype)
        yield "head.weight", np.zeros((CLASSES, width), dtype)
        yield "head.bias", np.zeros(CLASSES, dtype)

    def linear(self, name: str, path: str) -> Named:
        """Yields those of a linear layer."""
        yield f"{name}.weight", self.part(f"{path}/kernel").T
        yield f"{name}.bias", self.part(f"{path}/bias")

    def norm(self, name: str, path: str) -> Named:
        """Yields those of a norm."""
        yield f"{name}.weight", self.part(f"{path}/scale")
        yield f"{name}.bias", self.part(f"{path}/bias")

    def kernel(self, path: str) -> np.ndarray:
        """Returns a convolution's weight, `[out, in, height, width]`."""
        return self.part(f"{path}/kernel").transpose(3, 2, 0, 1)

    def part(self, path: str) -> Any:
        """Returns the encoder's array at a path."""
        return self.parts[f"encoder/{path}"]
