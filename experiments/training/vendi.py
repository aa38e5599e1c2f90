"""The Vendi score (Friedman and Dieng, arXiv 2210.02410): how many kinds there are."""

import numpy as np
from jaxtyping import Float


def vendi(embeddings: Float[np.ndarray, "N D"]) -> float:
    """Returns the effective number of different embeddings, from 1 to N.

    With `X` the embeddings at unit length and `l` the eigenvalues of `X X^T / N`, it
    is `exp(-sum(l ln l))`. Their scale does not matter. Computed in float64, of the
    smaller of `X X^T` and `X^T X`, whose eigenvalues other than 0 are the same.

    >>> round(vendi(np.eye(3)), 6), round(vendi(np.ones((3, 2))), 6)
    (3.0, 1.0)

    Raises:
      ValueError: there are no embeddings, or one is 0 or not finite.
    """
    x = np.asarray(embeddings, np.float64)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    if not len(x) or not np.isfinite(lengths).all() or not lengths.all():
        raise ValueError(
            f"embeddings of shape {x.shape}: expected at least one, finite and not 0."
        )
    x = x / lengths
    few = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    values = np.linalg.eigvalsh(few / len(x))
    values = values[values > 0]
    return float(np.exp(-(values * np.log(values)).sum()))
