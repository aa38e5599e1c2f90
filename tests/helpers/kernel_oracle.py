"""The formulas of kernels for one weight, in float64 NumPy, and generic factors."""

import jax
import jax.numpy as jnp
import numpy as np

from snella_jax import kernels

SCALARS = {"alpha": 1.3, "beta": -0.2, "gamma": 0.7}  # away from where they start
RANK = 6


def generic_factors(kernel, n=4, m=5, rank=RANK, seed=0):
    """float64 NumPy factors of the kernel's shapes with generic values."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: kernel.init(jax.random.key(0), (n, m), rank))
    return {
        name: np.float64(SCALARS[name])
        if name in SCALARS
        else rng.normal(size=shapes[name].shape)
        for name in shapes
    }


def as_jax(factors, dtype):
    return {name: jnp.asarray(value, dtype) for name, value in factors.items()}


def oracle(kernel, factors):
    """A kernel's update: its formula, less that at `b = 0`, less means."""
    delta = _whole(kernel, factors)
    if getattr(kernel, "start", "kernel") == "zero":
        at_zero = factors | {"b": np.zeros_like(factors["b"])}
        delta = delta - (_whole(kernel, at_zero) - factors.get("beta", 0.0))
    if kernel.centred in ("rows", "both"):
        delta = np.array([row - row.sum() / len(row) for row in delta])
    if kernel.centred in ("columns", "both"):
        delta = np.array([column - column.sum() / len(column) for column in delta.T]).T
    return delta


def _whole(kernel, factors):
    """The table of kernels, weight by weight in float64."""
    a, b = factors["a"], factors["b"]
    pieces, (n, m) = len(a), (a.shape[1], b.shape[1])
    alpha, beta = factors.get("alpha"), factors.get("beta", 0.0)

    def matrix(entry):
        return np.array([[entry(j, i) for i in range(m)] for j in range(n)])

    def norm(p, j, i):
        return np.sqrt(sum((s - t) ** 2 for s, t in zip(a[p, j], b[p, i], strict=True)))

    def inner(j, i):
        return sum(s * t for s, t in zip(a[0, j], b[0, i], strict=True))

    match type(kernel).__name__:
        case "linear":
            return matrix(inner)
        case "rbf":
            return alpha * matrix(lambda j, i: np.exp(-(norm(0, j, i) ** 2) / 2))
        case "sigmoid":
            return alpha * matrix(lambda j, i: 1 / (1 + np.exp(-inner(j, i))))

    coeff = factors["piece_coeff"]
    kappa = matrix(lambda j, i: sum(coeff[p] * norm(p, j, i) for p in range(pieces)))
    if isinstance(kernel, kernels.piecewise_linear):
        return kappa
    exp = np.exp(kappa / factors.get("gamma", 1.0))
    along = {"out": 1, "in": 0}[kernel.normalize_over]
    soft = alpha * exp / exp.sum(along, keepdims=True) + beta
    return soft if isinstance(kernel, kernels.normalized_rbf) else kappa + soft


def central_differences(function, factors, step=1e-6):
    """The gradient of a scalar function of NumPy factors, element by element."""
    grads = {name: np.zeros_like(value) for name, value in factors.items()}
    for name, value in factors.items():
        for index in np.ndindex(value.shape):
            ends = []
            for signed in (step, -step):
                moved = np.array(value)
                moved[index] += signed
                ends.append(function(factors | {name: moved}))
            grads[name][index] = (ends[0] - ends[1]) / (2 * step)
    return grads
