"""Flow matching as in Stable Diffusion 3: noise, its schedules, and Euler's sampler.

Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"
(2024). At noise level `sigma` a picture is `(1 - sigma) x0 + sigma noise`, on the
straight line from the picture `x0` to the noise; a model gives the line's direction,
`velocity = noise - x0`. Models get the time `1000 sigma`.

Axes: `B` pictures, `h`, `w` and `C` rows, columns and channels of their latents, `S`
tokens of a prompt.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = [
    "SHIFT",
    "STEPS",
    "Text",
    "Velocity",
    "noised",
    "sample",
    "sampling_sigmas",
    "training_sigmas",
]

STEPS = 1000  # of the training table; models see sigma as time, STEPS * sigma
SHIFT = 3.0  # of Stable Diffusion 3

Text = tuple[Float[Array, "B S D"], Float[Array, "B P"]]  # context and pooled
Velocity = Callable[..., Float[Array, "B h w C"]]


def training_sigmas(shift: float = SHIFT) -> Float[np.ndarray, "1000"]:
    """Returns the noise levels of training, from 1 (pure noise) down, float32.

    >>> training_sigmas()[[0, 500, 999]]
    array([1.        , 0.75      , 0.00299401], dtype=float32)

    Raises:
      ValueError: `shift` is not positive.
    """
    return _training_sigmas(shift).astype(np.float32)


def sampling_sigmas(steps: int, shift: float = SHIFT) -> Float[np.ndarray, " steps+1"]:
    """Returns the noise levels that a sampler visits, from 1 down to 0, float32.

    They are evenly spaced between the ends of the training table, whose shift is in
    them already, and shifted once more, as Stability's code and diffusers 0.42.1 do.

    >>> print(sampling_sigmas(4).round(4))
    [1.     0.8577 0.6022 0.0089 0.    ]

    Raises:
      ValueError: `steps` is no positive integer, or `shift` not positive.
    """
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"steps={steps!r}: expected an integer of at least 1.")
    table = _training_sigmas(shift)
    once = np.linspace(table[0], table[-1], steps)
    return np.append(_shifted(once, shift), 0).astype(np.float32)


def noised(
    x0: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    sigma: Float[Array, " B"] | float,
) -> Float[Array, "B ..."]:
    """Returns `(1 - sigma) x0 + sigma noise`, with a noise level for each picture."""
    sigma = jnp.asarray(sigma, jnp.float32)
    sigma = sigma.reshape(sigma.shape + (1,) * (x0.ndim - sigma.ndim))
    return (1 - sigma) * x0 + sigma * noise


def sample(
    model: Velocity,
    noise: Float[Array, "B h w C"],
    context: Float[Array, "B S D"],
    pooled: Float[Array, "B P"],
    empty: Text | None = None,
    *,
    steps: int = 28,
    guidance: Float[Array, ""] | float = 7.0,
    shift: float = SHIFT,
) -> Float[Array, "B h w C"]:
    """Follows a model's velocity from noise to pictures, by Euler's method in float32.

    Call it inside `jax.jit`. With guidance the velocity is
    `v_empty + guidance (v_text - v_empty)`; the model sees each picture twice then, one
    behind the other, so that a batch that is split over devices stays where it is.

    >>> point = jnp.full((1, 2, 2, 3), 0.5)     # the velocity towards a single picture
    >>> def model(x, time, context, pooled):
    ...     return (x - point) / (time / STEPS)[:, None, None, None]
    >>> noise = jax.random.normal(jax.random.key(0), (1, 2, 2, 3))
    >>> found = sample(model, noise, jnp.zeros((1, 4, 5)), jnp.zeros((1, 6)), steps=3)
    >>> bool(jnp.abs(found - point).max() < 1e-6)
    True

    Args:
      model: called with latents, time `[B]`, context and pooled; returns velocities.
      noise: standard normal numbers.
      context, pooled: encoded prompts.
      empty: context and pooled of the negative prompt, with `B` rows or one; None
        draws without guidance.
      steps: number of steps.
      guidance: strength of the prompt; with `empty` alone.
      shift: shift of the noise levels.

    Raises:
      ValueError: as `sampling_sigmas`.
    """
    sigmas = jnp.asarray(sampling_sigmas(steps, shift))
    if empty is not None:
        context, pooled = map(_paired, empty, (context, pooled))

    def velocity(x: Array, sigma: Array) -> Array:
        x = x if empty is None else jnp.repeat(x, 2, axis=0)
        time = jnp.full(len(x), STEPS * sigma)
        v = model(x, time, context, pooled).astype(jnp.float32)
        if empty is None:
            return v
        without, wanted = v[::2], v[1::2]
        return without + guidance * (wanted - without)

    def step(x: Array, ends: Array) -> tuple[Array, None]:
        sigma, following = ends
        return x + (following - sigma) * velocity(x, sigma), None

    ends = jnp.stack([sigmas[:-1], sigmas[1:]], 1)
    return jax.lax.scan(step, noise.astype(jnp.float32), ends)[0]


def _paired(
    empty: Float[Array, "#B ..."], text: Float[Array, "B ..."]
) -> Float[Array, "2*B ..."]:
    """Returns a batch in which each prompt stands behind its negative one."""
    both = jnp.stack([jnp.broadcast_to(empty, text.shape), text], 1)
    return both.reshape(-1, *text.shape[1:])


def _training_sigmas(shift: float) -> Float[np.ndarray, "1000"]:
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift={shift!r}: expected a positive number.")
    return _shifted(np.arange(STEPS, 0, -1) / STEPS, shift)


def _shifted(sigma: np.ndarray, shift: float) -> np.ndarray:
    return shift * sigma / (1 + (shift - 1) * sigma)
