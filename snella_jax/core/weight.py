"""One adapted weight: its rule, its axes and what makes its update.

All bindings read their weights (in an NNX layer, in a dict of parameters) as
`AdaptedWeight`s, so merging, inspection and files are written once.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from snella_jax.core.budgets import FIXED, allocate
from snella_jax.core.config import Rule, SnellaConfig
from snella_jax.core.delta import sparse_delta
from snella_jax.core.dense import summed
from snella_jax.core.layout import Layout
from snella_jax.core.update import Update
from snella_jax.files.hosts import to_host
from snella_jax.kernels import Factors, Kernel
from snella_jax.ops.threshold import threshold

log = logging.getLogger("snella_jax")

# What an adapter holds besides factors, in any binding.
OWN_NAMES = frozenset(
    {"allocated_at", "budget", "deterministic", "key", "names", "site"}
)


class BudgetsNeverMoved(RuntimeError):
    """Error of merging an adaptively sparse model whose budgets were left behind."""


@dataclasses.dataclass(frozen=True)
class Site:
    """Where an adapter sits, and its rule; static, equal by value.

    Attributes:
      rule: rank, kernel, gate and path of the update.
      layout: the axes of the weight, without the stack.
      stack: sizes of the axes of stacked blocks, outermost first.
      must_move: True if its budget has to be reallocated before merging.
      axes: places of the stack's axes in the weight; () for in front.
    """

    rule: Rule
    layout: Layout
    stack: tuple[int, ...] = ()
    must_move: bool = False
    axes: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.axes:
            object.__setattr__(self, "axes", self.front)
        elif len(self.axes) != len(self.stack):
            raise ValueError(
                f"axes={self.axes} for a stack of {self.stack}: expected one for each."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, stack included."""
        shape = list(self.layout.shape)
        for axis, size in sorted(zip(self.axes, self.stack, strict=True)):
            shape.insert(axis, size)
        return tuple(shape)

    @property
    def front(self) -> tuple[int, ...]:
        """Axes of a stack in front."""
        return tuple(range(len(self.stack)))

    @property
    def kernel(self) -> Any:
        """Kernel that makes the update."""
        return self.rule.kernel

    @property
    def update(self) -> Update:
        """How the update of the weight, without its stack, is made and added."""
        r = self.rule
        drops = r.dropout, r.drop_path
        how = r.path, *drops, r.rows, r.implementation
        return Update(self.kernel, r.gate, self.layout, *how)

    @property
    def lead(self) -> tuple[int, ...]:
        """Axes of the matrices: the stack, then the layout's slices."""
        return self.stack + self.layout.slices

    @property
    def capacity(self) -> int:
        """Number of weights of one matrix."""
        return self.layout.n * self.layout.m


@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """A weight of the base, and the factors and budgets of its update.

    Attributes:
      path: path of the layer that holds it, "/"-joined.
      site: its rule and its axes.
      w0: weight of shape `site.shape`: `[*stack, *layout.shape]` with a stack in front.
      factors: factors with the leading axes `site.lead`.
      budget: int32 `[*lead]`, weights that survive.
      allocated_at: int32 `[*lead]`: the optimizer step of the last reallocation, 0 for
        never, -1 where budgets are fixed.
    """

    path: str
    site: Site
    w0: Float[Array, " *weight"]
    factors: Factors
    budget: Int[Array, " *lead"]
    allocated_at: Int[Array, " *lead"]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its matrices: the path, with the index where there are several."""
        return tuple(indexed(self.path, i) for i in np.ndindex(self.site.lead))

    def matrices(self) -> Float[np.ndarray, "*lead n m"]:
        """Returns the weight of the base as its matrices, on the host."""
        layout = self.site.layout
        rows = np.moveaxis(to_host(self.w0), self.site.axes, self.site.front)
        whole = rows.reshape(-1, *layout.shape)
        parts = np.stack([layout.matrices(weight) for weight in whole])
        return parts.reshape(*self.site.lead, layout.n, layout.m)

    def delta(self) -> Float[Array, " *weight"]:
        """Returns the update of the whole weight, stack included, at least float32."""
        site = self.site
        one = _Measured(site.kernel, site.rule.gate, _itself, site.layout)
        # Not the site's: inside a scan over blocks there is no stack.
        stack = self.budget.ndim - len(site.layout.slices)
        delta = _for_each(self.factors, self.budget, stack, one)
        whole = stack == len(site.stack)
        return jnp.moveaxis(delta, site.front, site.axes) if whole else delta

    def per_matrix(self, measure: Callable[[Float[Array, "n m"]], Any]) -> Any:
        """Measures the update of each matrix; results have the axes `lead`.

        Compiled once for a function `measure`, so that should be no lambda.
        """
        one = _Measured(self.site.kernel, self.site.rule.gate, measure)
        return _for_each(self.factors, self.budget, self.budget.ndim, one)

    def thresholds(self) -> Float[Array, " *lead"]:
        """Returns `tau` of each matrix, which `|delta|` has to exceed."""
        one = _Threshold(self.site.kernel)
        return _for_each(self.factors, self.budget, self.budget.ndim, one)

    def merged(
        self, unmoved_budgets: bool = False, dtype: DTypeLike | None = None
    ) -> Float[Array, " *weight"]:
        """Returns `w0 + delta`, summed in at least float32.

        Args:
          unmoved_budgets: allow a budget that should have moved and never did.
          dtype: dtype of the sum; None for that of `w0`.

        Raises:
          BudgetsNeverMoved: its budget should have moved and never did, unless
            `unmoved_budgets`.
        """
        if not unmoved_budgets:
            self.check_moved()
        return add(self.path, self.w0, self.delta(), dtype)

    def check_moved(self) -> None:
        """Raises `BudgetsNeverMoved` if its budget should have moved and never did."""
        if self.site.must_move and not bool(jnp.any(self.allocated_at)):
            raise BudgetsNeverMoved(
                f"The budget of {self.path} was never reallocated, so the model is not "
                "as sparse as its config says. Call snella.reallocate(budgets, "
                "opt_state, total) once an epoch while training, and put the budgets "
                "that it returns back: nnx.update(model, budgets), or into the tree "
                "that is merged. For no competition between matrices use "
                'SnellaConfig(allocation="fixed"); to merge the model as it is, give '
                "merge unmoved_budgets=True."
            )


def indexed(path: str, index: Iterable[int]) -> str:
    """Appends an index to a path.

    >>> indexed("blocks/fc1", (3,)), indexed("head", ())
    ('blocks/fc1[3]', 'head')
    """
    return path + "".join(f"[{i}]" for i in index)


Counts = Int[Array, " *lead"] | Int[np.ndarray, " *lead"]
Start = tuple[Factors, Counts, Counts]


def start(
    sites: Mapping[str, Site], config: SnellaConfig, key: PRNGKeyArray
) -> dict[str, Start]:
    """Draws factors and divides budgets, as they are before training.

    Raises:
      ValueError: a kernel names a factor as an adapter names something of its own.
    """
    sizes = [math.prod(site.lead) for site in sites.values()]
    capacities = np.repeat([site.capacity for site in sites.values()], sizes)
    total = round(config.starting_density * int(capacities.sum()))
    counts = allocate(np.zeros(len(capacities)), total, capacities)
    budgets = np.split(counts.astype(np.int32), np.cumsum(sizes)[:-1])
    since = FIXED if config.allocation == "fixed" else 0
    return {
        path: (
            _factors(site, jax.random.fold_in(key, index)),
            budget.reshape(site.lead),
            np.full(site.lead, since, np.int32),
        )
        for index, ((path, site), budget) in enumerate(
            zip(sites.items(), budgets, strict=True)
        )
    }


def _factors(site: Site, key: PRNGKeyArray) -> Factors:
    shape = site.layout.n, site.layout.m
    init = functools.partial(site.kernel.init, shape=shape, rank=site.rule.rank)
    for _ in site.lead:
        init = jax.vmap(init)
    made = init(jax.random.split(key, site.lead) if site.lead else key)
    if taken := sorted(made.keys() & OWN_NAMES):
        raise ValueError(
            f"{site.kernel} has a factor named {taken[0]!r}: expected another name, as "
            f"an adapter has its own {', '.join(sorted(OWN_NAMES))}."
        )
    return made


def _itself(delta: Array) -> Array:
    return delta


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A measure of a sparse update; equal by value, so compiled once."""

    kernel: Kernel
    gate: str
    measure: Callable[[Array], Any]
    layout: Layout | None = None

    def __call__(self, own: tuple[Factors, Array]) -> Any:
        how: Any = {"kernel": self.kernel, "gate": self.gate, "layout": self.layout}
        return self.measure(sparse_delta(*own, **how))


@dataclasses.dataclass(frozen=True)
class _Threshold:
    kernel: Kernel

    def __call__(self, own: tuple[Factors, Array]) -> Array:
        factors, budget = own
        return threshold(self.kernel.apply(factors), budget)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _for_each(factors: Factors, budget: Array, axes: int, one: Callable) -> Any:
    """Maps `one` over a number of leading axes."""
    for _ in range(axes):  # one matrix at a time: a threshold needs room
        one = functools.partial(jax.lax.map, one)
    return one((factors, budget))


def add(path: str, w0: Array, delta: Array, dtype: DTypeLike | None = None) -> Array:
    """Returns `w0 + delta`, in the dtype of `w0` if none is given.

    Logs what rounding lost.
    """
    dtype = jnp.dtype(w0.dtype if dtype is None else dtype)
    merged = summed(w0, delta).astype(dtype)
    if dtype.itemsize < delta.dtype.itemsize:
        moved = jnp.count_nonzero(delta)
        unseen = jnp.count_nonzero((delta != 0) & (merged == w0.astype(dtype)))
        if unseen > 0:
            log.warning(
                "merging %s into %s lost %.1f%% of its moved weights to rounding: "
                "merge(dtype=jnp.float32) keeps them, for layers that compute in "
                "float32; others serve the adapted model with path='parallel', which "
                "rounds no weight",
                path,
                dtype,
                100 * int(unseen) / int(moved),
            )
    return merged
