"""Shape and arithmetic of a SAM, and the presets."""

import dataclasses
from typing import Any

from snella_jax.models.layers.images import IMAGENET_MEAN, IMAGENET_STD
from snella_jax.models.sam.tiny_vit import TinyViTConfig
from snella_jax.models.sam.vit_encoder import ViTEncoderConfig

COUNTS = ("decoder_depth", "decoder_heads", "decoder_mlp_dim", "iou_hidden", "masks")


@dataclasses.dataclass(frozen=True)
class SamConfig:
    """Shape and arithmetic of a `Sam`.

    What the encoder's config says, such as `image_size`, `dtype` and `remat`, holds for
    the whole model; `create` and `load` take its fields beside those here.

    Attributes:
      encoder: config of the image encoder; its `out_channels` are the width `C` of the
        prompt encoder and the decoder.
      decoder_depth: number of two-way layers of the decoder.
      decoder_heads: attention heads of the decoder; divides `C / 2`.
      decoder_mlp_dim: hidden width of its MLPs.
      decoder_norm_eps: epsilon of the norms in its layers: 1e-5 in Meta's code, 1e-6 in
        transformers. All other norms of the decoder have the same one in both.
      iou_hidden: hidden width of the head that predicts each mask's IoU.
      masks: number of masks that are predicted, the first for unambiguous prompts.
      mask_channels: channels of a mask prompt before the last convolution.
      pixel_mean: mean of each channel that `normalise` subtracts, of pixels in [0, 1].
      pixel_std: deviation of each channel that it divides by.
    """

    encoder: ViTEncoderConfig | TinyViTConfig
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    decoder_norm_eps: float = 1e-5
    iou_hidden: int = 256
    masks: int = 4
    mask_channels: int = 16
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    pixel_std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.masks < 2:
            raise ValueError(f"masks={self.masks}: expected at least 2.")
        if self.width % 8 or (self.width // 2) % self.decoder_heads:
            raise ValueError(
                f"out_channels={self.width}: expected a multiple of 8 whose half "
                f"decoder_heads={self.decoder_heads} divides."
            )
        if self.mask_channels < 4 or self.mask_channels % 4:
            raise ValueError(
                f"mask_channels={self.mask_channels}: expected a multiple of 4."
            )
        if not self.decoder_norm_eps > 0:
            raise ValueError(
                f"decoder_norm_eps={self.decoder_norm_eps}: expected a positive number."
            )
        for name in ("pixel_mean", "pixel_std"):
            numbers = getattr(self, name)
            if len(numbers) not in (1, self.channels):
                raise ValueError(f"{name}={numbers}: expected {self.channels} numbers.")

    @property
    def width(self) -> int:
        """Width `C` of the image embedding, the prompts and the decoder."""
        return self.encoder.out_channels

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.encoder.image_hw

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the image embedding."""
        return self.encoder.grid

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.encoder.channels

    @property
    def stacked(self) -> bool:
        """True if the encoder's blocks are stacked."""
        return self.encoder.stacked

    @property
    def remat(self) -> str:
        """The encoder's `remat`."""
        return self.encoder.remat

    @property
    def dtype(self) -> Any:
        """Dtype of the computation; mask logits are float32 whatever it is."""
        return self.encoder.dtype

    @property
    def param_dtype(self) -> Any:
        """Dtype in which the weights are kept."""
        return self.encoder.param_dtype


PRESETS = {
    "sam_vit_b": SamConfig(
        ViTEncoderConfig(
            width=768, depth=12, heads=12, mlp_dim=3072, global_blocks=(2, 5, 8, 11)
        )
    ),
    "sam_vit_l": SamConfig(
        ViTEncoderConfig(
            width=1024, depth=24, heads=16, mlp_dim=4096, global_blocks=(5, 11, 17, 23)
        )
    ),
    "sam_vit_h": SamConfig(
        ViTEncoderConfig(
            width=1280, depth=32, heads=16, mlp_dim=5120, global_blocks=(7, 15, 23, 31)
        )
    ),
    "sam_tinyvit": SamConfig(TinyViTConfig()),
}
