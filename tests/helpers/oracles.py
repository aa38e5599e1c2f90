"""Updates in float64 NumPy, by sorting."""

import numpy as np


def oracle_delta(factors, budget, n, m):
    """The gated Mix-K update of one [n, m] matrix in float64 NumPy, by sorting."""
    f = {k: np.asarray(v, np.float64) for k, v in factors.items()}
    difference = f["a"][:, :, None] - f["b"][:, None]  # [P, n, m, r/P]
    kappa = np.einsum("p,pnm->nm", f["piece_coeff"], np.sqrt((difference**2).sum(-1)))
    e = np.exp(kappa)
    delta = kappa + f["alpha"] * e / e.sum(1, keepdims=True) + f["beta"]
    size = np.sort(np.abs(delta).ravel())[::-1]
    tau = size[budget] if budget < n * m else 0.0
    return np.where(np.abs(delta) > tau, delta * (np.abs(delta) - tau), 0)


def oracle_deltas(adapter, n, m):
    """One update for each matrix of an adapter, `[*lead, n, m]`."""
    budget = np.asarray(adapter.budget[...])
    factors = {k: np.asarray(v) for k, v in adapter.factors().items()}
    out = np.zeros((*budget.shape, n, m))
    for i in np.ndindex(budget.shape):
        own = {k: v[i] for k, v in factors.items()}
        out[i] = oracle_delta(own, int(budget[i]), n, m)
    return out
