"""VPT (Jia et al., arXiv 2203.12119): learnt tokens beside those of the image.

Shallow: they enter the first block, and go through all. Deep: every block gets its own,
in the place of what has become of the last one's. Uniform at the start, as wide as an
embedded patch would be. They stand behind the image's tokens, which attention cannot
tell from VPT's place in front of them. Simplified: no dropout on them. At inference
they stay: every block has so many tokens more.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.methods import plain_vit
from experiments.methods.method import Method, check_counts
from experiments.training.session import Scope
from snella_jax.models.vit import ViTConfig
from snella_jax.nnx.surgery import become, freeze, mixed_class
from snella_jax.nnx.variables import Factor


@dataclasses.dataclass(frozen=True)
class Tokens(Method):
    """A method with tokens of its own."""

    needs_vit: ClassVar[bool] = True

    lr: float = 1e-2
    """Peak learning rate."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW; tokens have none in any case."""
    count: int = 10
    """Number of tokens, in each block where every block has its own."""

    def check(self, name: str) -> None:
        """Raises a `ValueError` on settings that would fail in the midst of a run."""
        super().check(name)
        check_counts(name, count=self.count)


@dataclasses.dataclass(frozen=True)
class VptShallow(Tokens):
    """Learnt tokens at the first block."""

    title: ClassVar[str] = "VPT-Shallow"

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a ViT with prompts at its first block.

        Raises:
          ValueError: `scope.trainable` matches nothing, or the model is no ViT.
        """
        plain_vit.require(base, "VPT")
        model = nnx.clone(base)
        model.prompts = drawn(model.config, (self.count,), scope.rngs().params())
        become(model, mixed_class(Prompted, type(model)))
        freeze(model, scope.trainable)
        return model


@dataclasses.dataclass(frozen=True)
class VptDeep(Tokens):
    """Learnt tokens at every block."""

    title: ClassVar[str] = "VPT-Deep"

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a ViT with prompts at every block.

        Raises:
          ValueError: `scope.trainable` matches nothing, or the model is no ViT.
        """
        plain_vit.require(base, "VPT")
        model, rngs = nnx.clone(base), scope.rngs()
        c = model.config
        shape = (c.depth, self.count) if c.stacked else (self.count,)
        for block in [model.blocks] if c.stacked else model.blocks:
            join(block, drawn(c, shape, rngs.params()))
        freeze(model, scope.trainable)
        return model


class Prompted(nnx.Module):
    """Mixed into a ViT: puts prompts behind the tokens, and takes them away again."""

    prompts: Factor

    def _embed(self, images: Array) -> Array:
        tokens = super()._embed(images)  # pyright: ignore[reportAttributeAccessIssue]
        return behind(tokens, self.prompts[...])

    def features(self, images: Array, key: Any = None, *, layers: Any = None) -> Any:
        """Returns the features of the image's tokens, without those of the prompts."""
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
        """Returns the attention among all tokens, of which the prompts are the last."""
        block: Any = super()
        return block.attention_map(behind(x, self.prompts[...]))


def join(block: Any, prompts: Factor) -> None:
    """Gives a block prompts of its own, in place."""
    block.prompts = prompts
    become(block, mixed_class(Prompting, type(block)))


def drawn(config: ViTConfig, shape: tuple[int, ...], key: PRNGKeyArray) -> Factor:
    """Draws tokens `[*shape, D]`, uniform as Xavier's for the patch embedding."""
    fans = config.channels * math.prod(config.patch_hw) + config.width
    bound = (6 / fans) ** 0.5
    whole = (*shape, config.width)
    return Factor(jax.random.uniform(key, whole, None, -bound, bound))


def behind(
    tokens: Float[Array, "B T D"], prompts: Float[Array, "P D"]
) -> Float[Array, "B T_plus_P D"]:
    """Puts the prompts behind the tokens of every image."""
    every = jnp.broadcast_to(
        prompts.astype(tokens.dtype), (len(tokens), *prompts.shape)
    )
    return jnp.concatenate([tokens, every], 1)
