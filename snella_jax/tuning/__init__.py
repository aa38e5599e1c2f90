"""Training in three calls: a step, an epoch's end, a plain model."""

from snella_jax.tuning.state import Tuning

__all__ = ["Tuning"]
