"""VPT (Jia et al., arXiv 2203.12119): learnt tokens beside those of the image.

Shallow: they enter the first block, and go through all. Deep: every block gets its own,
in the place of what has become of the last one's. Uniform at the start, as wide as an
embedded patch would be. They stand behind the image's tokens, which attention cannot
tell from VPT's place in front of them. Simplified: no dropout on them. At inference
they stay: every block has so many tokens more.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.methods import plain_vit
from snella_jax.models.vit import ViT, ViTConfig
from snella_jax.nnx.surgery import become, freeze, mixed_class
from snella_jax.nnx.variables import Factor


class Prompted(nnx.Module):
    """Mixed into a ViT: puts prompts behind the tokens, and takes them away again."""

    prompts: Factor

    def _embed(self, images: Array) -> Array:
        tokens = super()._embed(images)  # pyright: ignore[reportAttributeAccessIssue]
        return behind(tokens, self.prompts[...])

    def features(self, images: Array, key: Any = None, *, layers: Any = None) -> Any:
        """As without prompts; they are not among the tokens."""
        base: Any = super()
        count = len(self.prompts[...])
        found = base.features(images, key, layers=layers)
        return jax.tree.map(lambda tokens: tokens[:, :-count], found)

    def attention_maps(self, images: Array, *, layers: tuple[int, ...]) -> Any:
        """Not implemented: between blocks the prompts are not among the tokens."""
        raise NotImplementedError("There are no attention maps with prompts.")


class Prompting(nnx.Module):
    """Mixed into a block: its own prompts enter with the tokens, and leave again."""

    prompts: Factor

    def __call__(self, x: Float[Array, "B T D"], drop: Any = None) -> Array:
        block: Any = super()
        return block.__call__(behind(x, self.prompts[...]), drop)[:, : x.shape[1]]

    def attention_map(self, x: Float[Array, "B T D"]) -> Float[Array, "B H S S"]:
        """As without prompts; they are the last of the tokens."""
        block: Any = super()
        return block.attention_map(behind(x, self.prompts[...]))


def adapt(
    model: ViT,
    where: Literal["shallow", "deep"],
    trainable: str,
    count: int,
    rngs: nnx.Rngs,
) -> Any:
    """A copy of a ViT with `count` prompts, at its first block or at each.

    Raises:
      ValueError: `trainable` matches nothing, or the model is no ViT.
    """
    plain_vit.require(model, "VPT")
    prompted: Any = nnx.clone(model)
    c = prompted.config
    if where == "shallow":
        prompted.prompts = drawn(c, (count,), rngs.params())
        become(prompted, mixed_class(Prompted, type(prompted)))
    else:
        shape = (c.depth, count) if c.stacked else (count,)
        for block in [prompted.blocks] if c.stacked else prompted.blocks:
            join(block, drawn(c, shape, rngs.params()))
    freeze(prompted, trainable)
    return prompted


def join(block: Any, prompts: Factor) -> None:
    """Gives a block prompts of its own, in place."""
    block.prompts = prompts
    become(block, mixed_class(Prompting, type(block)))


def drawn(config: ViTConfig, shape: tuple[int, ...], key: PRNGKeyArray) -> Factor:
    """Tokens `[*shape, D]`, uniform as Xavier's weights of the patch embedding."""
    fans = config.channels * math.prod(config.patch_hw) + config.width
    bound = (6 / fans) ** 0.5
    whole = (*shape, config.width)
    return Factor(jax.random.uniform(key, whole, None, -bound, bound))


def behind(
    tokens: Float[Array, "B T D"], prompts: Float[Array, "P D"]
) -> Float[Array, "B T_plus_P D"]:
    """The tokens of every image, and the prompts behind them."""
    every = jnp.broadcast_to(
        prompts.astype(tokens.dtype), (len(tokens), *prompts.shape)
    )
    return jnp.concatenate([tokens, every], 1)
