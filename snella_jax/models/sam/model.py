"""SAM (Kirillov et al., arXiv 2304.02643) in Flax NNX: masks of images from prompts.

An image encoder, a ViT or a TinyViT, makes an embedding of an image, once; the prompt
encoder and the mask decoder make masks of it. Axes: `B` images, `N` points, `M` masks,
`h`, `w` the grid of the embedding, 16 pixels a place, and `C` its width.

    >>> from snella_jax.models import sam
    >>> sizes = {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 32, "out_channels": 32}
    >>> def predicted(boxes):
    ...     model = sam.create("sam_vit_b", image_size=64, global_blocks=(1,), window=3,
    ...                        **sizes, rngs=nnx.Rngs(0))
    ...     images = model.normalise(jnp.zeros((2, 64, 64, 3)))
    ...     return model(images, boxes=boxes)
    >>> masks, iou = nnx.eval_shape(predicted, jnp.array([[8, 8, 40, 50]] * 2))
    >>> masks.shape, iou.shape
    ((2, 1, 16, 16), (2, 1))
"""

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Num

from snella_jax.models.layers import images as pixels
from snella_jax.models.layers import preset
from snella_jax.models.sam.config import PRESETS, SamConfig
from snella_jax.models.sam.decoder import MaskDecoder
from snella_jax.models.sam.prompts import PromptEncoder
from snella_jax.models.sam.tiny_vit import TinyViT, TinyViTConfig
from snella_jax.models.sam.vit_encoder import ViTEncoder

Masks = tuple[Float[Array, "B M 4*h 4*w"], Float[Array, "B M"]]


def create(name: str, *, rngs: nnx.Rngs, **overrides: Any) -> "Sam":
    """Makes a randomly initialised preset, any field of its configs overridden.

    Raises:
      ValueError: `name` is not a preset; the message has the nearest ones.
    """
    where = "snella_jax.models.sam.PRESETS"
    return Sam(preset.named(name, PRESETS, "SAM", where, **overrides), rngs=rngs)


class Sam(nnx.Module):
    """Image encoder, prompt encoder and mask decoder.

    Attributes:
      default_targets: regex of the encoder's matrices that are adapted.
      default_trainable: regex of what trains besides: the decoder, and the embedding
        that stands for the mask prompt where there is none.
    """

    default_targets: ClassVar[str] = r"encoder/.*/(q|k|v|proj|fc1|fc2)"
    default_trainable: ClassVar[str] = r"decoder|prompts/no_mask_embed"

    def __init__(self, config: SamConfig, *, rngs: nnx.Rngs):
        self.config = config
        if isinstance(config.encoder, TinyViTConfig):
            self.encoder = TinyViT(config.encoder, rngs=rngs)
        else:
            self.encoder = ViTEncoder(config.encoder, rngs=rngs)
        self.prompts = PromptEncoder(config, rngs=rngs)
        self.decoder = MaskDecoder(config, rngs=rngs)

    def __call__(
        self,
        images: Float[Array, "B H W 3"],
        points: Num[Array, "B N 2"] | None = None,
        labels: Int[Array, "B N"] | None = None,
        boxes: Num[Array, "B 4"] | None = None,
        multimask: bool = False,
        mask: Float[Array, "B H/4 W/4"] | None = None,
    ) -> Masks:
        """Returns logits of masks and a prediction of each one's IoU, both float32.

        Args:
          images: normalised, and padded to the configured size.
          points: (x, y) in pixels of `images`, with `labels`.
          labels: 1 for a point on the object, 0 for one beside it, -1 for one that
            stands for none, where images have different numbers of points.
          boxes: one around the object of each image, (x0, y0, x1, y1) in pixels.
          multimask: True for masks 1 to 3, which suit ambiguous prompts; False for
            mask 0.
          mask: logits of an earlier mask to refine.

        Raises:
          ValueError: an argument has another shape, points have no labels, or there are
            other labels.
          TypeError: labels are no integers.
        """
        _check(self.config, len(images), points, labels, boxes, mask)
        return self.decode(self.encode(images), points, labels, boxes, multimask, mask)

    def encode(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        """Returns the images' embeddings, which `decode` takes with any prompts.

        Raises:
          ValueError: the images do not have the configured height, width or channels.
        """
        pixels.check_batch(images, self.config)
        return self.encoder(images)

    def decode(
        self,
        embeddings: Float[Array, "B h w C"],
        points: Num[Array, "B N 2"] | None = None,
        labels: Int[Array, "B N"] | None = None,
        boxes: Num[Array, "B 4"] | None = None,
        multimask: bool = False,
        mask: Float[Array, "B 4*h 4*w"] | None = None,
    ) -> Masks:
        """Returns masks from what `encode` returned; all else as in the call."""
        config = self.config
        expected = (*config.grid, config.width)
        if embeddings.ndim != 4 or embeddings.shape[1:] != expected:
            raise ValueError(
                f"embeddings have shape {embeddings.shape}; this model takes "
                f"[B, {', '.join(map(str, expected))}]."
            )
        _check(config, len(embeddings), points, labels, boxes, mask)
        embeddings = embeddings.astype(config.dtype)
        prompts, dense = self.prompts(points, labels, boxes, mask)
        positions = self.prompts.positions()
        return self.decoder(embeddings, positions, prompts, dense, multimask)

    def normalise(self, values: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """Returns images as the weights expect them, from pixels in [0, 1].

        Where an image is padded, that comes after: SAM's padding is 0 in normalised
        images.

        Raises:
          TypeError: the pixels are integers, which would be 0 to 255.
        """
        return pixels.normalise(values, self.config)


def _check(
    config: SamConfig,
    batch: int,
    points: Any,
    labels: Any,
    boxes: Any,
    mask: Any,
) -> None:
    """Raises the errors of the call about prompts."""
    if (points is None) != (labels is None):
        has, lacks = ("labels", "points") if points is None else ("points", "labels")
        raise ValueError(f"{has} without {lacks}: expected both or neither.")
    count: Any = (
        jnp.shape(points)[1] if points is not None and jnp.ndim(points) == 3 else "N"
    )
    fine = tuple(4 * size for size in config.grid)
    expected = [
        ("points", points, "B, N, 2", (batch, count, 2)),
        ("labels", labels, "B, N", (batch, count)),
        ("boxes", boxes, "B, 4", (batch, 4)),
        ("mask", mask, "B, H/4, W/4", (batch, *fine)),
    ]
    for name, value, axes, shape in expected:
        if value is not None and jnp.shape(value) != shape:
            raise ValueError(
                f"{name}: expected [{axes}], here [{', '.join(map(str, shape))}], "
                f"found {list(jnp.shape(value))}."
            )
    if labels is not None:
        check_labels(labels)


def check_labels(labels: Any) -> None:
    """Raises a `TypeError` or `ValueError` on labels that no point has.

    Values are seen outside `jit` only.
    """
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"labels are {jnp.result_type(labels)}: expected integers.")
    if not isinstance(labels, Tracer):
        known = np.isin(np.asarray(labels), (-1, 0, 1))
        if not known.all():
            other = np.unique(np.asarray(labels)[~known]).tolist()
            raise ValueError(f"labels has {other}: expected 1, 0 or -1.")
