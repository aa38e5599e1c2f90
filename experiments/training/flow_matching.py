"""Flow matching: a model learns the velocity from pictures to noise.

The recipe is that of diffusers' `train_dreambooth_lora_sd3`. A noise level is drawn
for each picture, logit-normally, from the table of training levels; the latents are
drawn anew in each step from the moments that the autoencoder gave of the picture.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.axes import Axes

from experiments import plotting
from experiments.training.objective import Batch, Metric, Sums
from snella_jax.models.sd3 import flow

PRIOR = "prior_"  # of the names of a batch's arrays that are of the class's pictures
LEVELS = 8  # of noise, at which the loss of an evaluation is taken
LOSS = Metric("loss", more_is_better=False)

Moments = Mapping[str, Float[Array, "B ..."]]


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """Objective of batches with moments of latents and encoded prompts.

    A batch has `mean [B, h, w, C]`, `context [B, S, D]` and `pooled [B, P]`, and
    `logvar`, like `mean`, where latents are drawn and not given. With prior
    preservation it has the same of the class's pictures, their names behind `prior_`.

    Attributes:
      scale, shift: latents are `(z - shift) * scale` of what moments describe.
      precondition: True for the loss of the picture that the velocity leads to,
        `sigma^2` times that of the velocity; False for the latter.
      prior_weight: weight of the loss of the class's pictures.
      noise_shift: shift of the table of noise levels.
      metrics: metrics of an evaluation; those besides `loss` are none of `numbers`,
        and the kind of run measures them.
    """

    scale: float = 1.0
    shift: float = 0.0
    precondition: bool = True
    prior_weight: float = 1.0
    noise_shift: float = flow.SHIFT
    metrics: tuple[Metric, ...] = (LOSS,)

    def loss(
        self, model: Any, batch: Batch, key: PRNGKeyArray | None
    ) -> Float[Array, ""]:
        """Returns the mean loss, plus that of the class's pictures times its weight.

        Raises:
          ValueError: there is no key to draw from.
        """
        if key is None:
            raise ValueError("flow matching draws noise: expected a key.")
        of_prior = {n.removeprefix(PRIOR): x for n, x in batch.items()
                    if n.startswith(PRIOR)}  # fmt: skip
        if not of_prior:
            return self._losses(model, batch, key).mean()
        both = {n: jnp.concatenate([batch[n], x]) for n, x in of_prior.items()}
        losses, count = self._losses(model, both, key), len(batch["mean"])
        return losses[:count].mean() + self.prior_weight * losses[count:].mean()

    def _losses(
        self, model: Any, batch: Moments, key: PRNGKeyArray
    ) -> Float[Array, " B"]:
        of_latents, of_level, of_noise = jax.random.split(key, 3)
        x0 = self.latents(batch, of_latents)
        index = levels(of_level, len(x0))
        noise = jax.random.normal(of_noise, x0.shape)
        return self.errors(model, x0, noise, index, batch["context"], batch["pooled"])

    def latents(
        self, batch: Moments, key: PRNGKeyArray | None
    ) -> Float[Array, "B h w C"]:
        """Returns latents as the model sees them; their mean where there is no key."""
        z = batch["mean"]
        if key is not None and "logvar" in batch:
            deviation = jnp.exp(0.5 * batch["logvar"])
            z = z + deviation * jax.random.normal(key, z.shape)
        return (z - self.shift) * self.scale

    def errors(
        self,
        model: Any,
        x0: Float[Array, "B h w C"],
        noise: Float[Array, "B h w C"],
        index: Int[Array, " B"],
        context: Float[Array, "B S D"],
        pooled: Float[Array, "B P"],
    ) -> Float[Array, " B"]:
        """Returns each picture's mean squared error at a level of the training table.

        The velocity `v` of `x = (1 - sigma) x0 + sigma noise` should be `noise - x0`.
        With `precondition` the error is that of `x - sigma v`, which should be `x0`.
        """
        sigma = jnp.asarray(flow.training_sigmas(self.noise_shift))[index]
        x = flow.noised(x0, noise, sigma)
        velocity = model(x, flow.STEPS * sigma, context, pooled)
        errors = jnp.square(velocity - (noise - x0)).mean((1, 2, 3))
        return jnp.square(sigma) * errors if self.precondition else errors

    def outputs(self, model: Any, batch: Batch) -> dict[str, Array]:
        """Returns `loss [B]`, the mean over eight noise levels, the same every time.

        Latents are their means, and the noise depends on an example's index alone.
        """
        x0 = self.latents(batch, None)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(
            batch["index"]
        )
        text = batch["context"], batch["pooled"]

        def at(level: Array) -> Array:
            own = jax.vmap(lambda key: jax.random.fold_in(key, level))(keys)
            noise = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(own)
            return self.errors(model, x0, noise, jnp.full(len(x0), level), *text)

        where = (np.arange(LEVELS) + 0.5) * flow.STEPS / LEVELS
        found = jax.lax.map(at, jnp.asarray(where, jnp.int32))
        return {"loss": found.mean(0)}

    def sums(self, outputs: dict[str, Array], batch: Batch) -> dict[str, Array]:
        """Returns the summed loss and the number of pictures."""
        valid = batch["valid"]
        return {"loss": (outputs["loss"] * valid).sum(), "pictures": valid.sum()}

    score = None

    def numbers(self, sums: Sums) -> dict[str, float]:
        """Returns the mean `loss`."""
        return {LOSS.name: sums["loss"] / sums["pictures"]}

    def draw(self, axes: Axes, example: Any, output: dict[str, Any]) -> None:
        """Draws a photograph with its loss."""
        axes.imshow(example["image"])
        axes.set_title(
            plotting.label(f"{example['name']} {output['loss']:.3f}"), fontsize=8
        )


def levels(key: PRNGKeyArray, count: int) -> Int[Array, " count"]:
    """Draws indices of the training table, logit-normally: `floor(1000 sigmoid(N))`.

    The table goes from pure noise down; its median level is 0.75.
    """
    share = jax.nn.sigmoid(jax.random.normal(key, (count,)))
    return jnp.minimum((flow.STEPS * share).astype(jnp.int32), flow.STEPS - 1)
