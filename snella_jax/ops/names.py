"""Names of arrays, by which a recomputed block tells what it keeps."""

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

KEPT = "snella_jax.kept"  # of what every recomputed block keeps
OUTPUTS = "outputs"  # of products that few layers keep, and of sketches


def kept(value: Array) -> Array:
    """Marks an array that `rematerialised` keeps: small, and costly to make again."""
    return checkpoint_name(value, KEPT)


def named(value: Array, name: str) -> Array:
    """Names an array that `rematerialised` keeps if it is told so."""
    return checkpoint_name(value, f"snella_jax.{name}")
