"""Kernels: how two low-rank factors make a weight update (the paper's Section 3.2).

A kernel is a frozen dataclass, equal and hashable by value, with two pure functions:
`init` draws the factors of one matrix and `apply` makes its dense update `delta`.
Factors are a dict: `a[P, n, r/P]`, `b[P, m, r/P]` and the kernel's scalars. `apply`
also takes factors unfolded over the axes of a higher-rank weight, `a[P, *n, r/P]` and
`b[P, *m, r/P]`, and then gives `delta[*n, *m]`, without reshaping anything of that
size.

    >>> import jax
    >>> kernel = mix_k()
    >>> factors = kernel.init(jax.random.key(0), (6, 4), rank=8)
    >>> sorted(factors), kernel.apply(factors).shape
    (['a', 'alpha', 'b', 'beta', 'piece_coeff'], (6, 4))
"""

from snella_jax.kernels.kernel import (
    Factors,
    Kernel,
    Measured,
    Statistics,
    is_measured,
    starts_at_zero,
)
from snella_jax.kernels.plain import linear, piecewise_linear, rbf, sigmoid
from snella_jax.kernels.softmaxed import mix_k, normalized_rbf

__all__ = [
    "KERNELS",
    "Factors",
    "Kernel",
    "Measured",
    "Statistics",
    "is_measured",
    "linear",
    "mix_k",
    "named",
    "normalized_rbf",
    "piecewise_linear",
    "rbf",
    "sigmoid",
    "starts_at_zero",
]

KERNELS = {
    kernel.__name__: kernel
    for kernel in (linear, piecewise_linear, rbf, sigmoid, normalized_rbf, mix_k)
}


def named(kernel: str | Kernel) -> Kernel:
    """Returns the kernel of that name with default settings; a kernel passes through.

    Raises:
      ValueError: no kernel has that name; the message lists them.

    >>> named("rbf") == rbf()
    True
    """
    if not isinstance(kernel, str):
        return kernel
    if kernel not in KERNELS:
        raise ValueError(
            f"No kernel is called {kernel!r}: expected {', '.join(KERNELS)}."
        )
    return KERNELS[kernel]()
