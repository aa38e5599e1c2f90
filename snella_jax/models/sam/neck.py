"""The neck of SAM's image encoders."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from snella_jax.models.layers import basic, pointwise

EPS = 1e-6  # of both norms


class Neck(nnx.Module):
    """Convolutions of 1 x 1 and 3 x 3 to the output's width, a norm behind each."""

    def __init__(self, width: int, config: Any, *, rngs: nnx.Rngs):
        """Draws the weights.

        Args:
          width: width of the encoder's last block.
          config: has `out_channels`, `dtype` and `param_dtype`.
          rngs: its `params` stream draws.
        """
        c, out = config, config.out_channels
        usual: dict[str, Any] = {
            "use_bias": False,
            "dtype": c.dtype,
            "param_dtype": c.param_dtype,
            "rngs": rngs,
        }
        single = pointwise.multiplied
        self.conv1 = nnx.Conv(width, out, (1, 1), conv_general_dilated=single, **usual)
        self.norm1 = basic.norm(out, EPS, c, rngs)
        self.conv2 = nnx.Conv(out, out, (3, 3), **usual)
        self.norm2 = basic.norm(out, EPS, c, rngs)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w out"]:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))))
