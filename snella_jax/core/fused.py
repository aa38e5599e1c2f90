"""Fused kernels in the place of a merged product, where they serve it.

`refusal` says in words what they do not serve; there the plain code runs. What is
computed is the same but for rounding: `y = x @ (w0 + delta)`, and gradients.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh
from jaxtyping import Array

from snella_jax import kernels
from snella_jax.core.layout import Layout
from snella_jax.kernels import Factors, Kernel
from snella_jax.ops.names import kept as marked
from snella_jax.ops.product import around_product
from snella_jax.ops.recompute import behind_one_barrier
from snella_jax.ops.sketch import Sketch

if TYPE_CHECKING:
    from snella_jax.ops.pallas.target import Target
    from snella_jax.ops.pallas.tile import Form

Implementation = Literal["auto", "xla", "pallas"]
LARGEST_RANK = 64  # whose columns are written out one by one

log = logging.getLogger("snella_jax")


def check_implementation(value: str) -> None:
    """Raises a `ValueError` for an unknown implementation."""
    if value not in get_args(Implementation):
        raise ValueError(
            f"No implementation is called {value!r}: expected "
            f"{', '.join(get_args(Implementation))}."
        )


def fused_call(
    op: Callable[[Array, Array], Any],
    x: Array,
    w0: Array,
    factors: Factors,
    *,
    sketch: Sketch | None,
    **how: Any,
) -> Callable[..., Any] | None:
    """Makes a call whose product is fused; None, and a sentence logged, if none is.

    Args:
      op: the call, of `x` and of a weight.
      x, w0, factors: arrays like those that it will be given.
      sketch: rows that are kept for the way back instead of `x`; None for all.
      how: kernel, gate, layout, path and sharding, as in `refusal`.

    Returns:
      A function of `x`, `rows` (or None), `w0`, factors, budget and key.
    """
    why = refusal(x, w0, factors, **how)
    around = None if why else around_product(op, x, w0.astype(x.dtype))
    if around is None:
        fall_back(why or "a call that does not only multiply by its weight")
        return None
    rest, extras = around
    sketched = None
    if sketch is not None:
        sketched = functools.partial(sketch.of_both, axis=x.ndim - 2)
    run = fused(Product.of(how["kernel"], how["gate"]), sketched)

    def call(x, rows, *operands):
        return rest(x, run(x, rows, *operands), extras)

    return call


def refusal(
    x: Array,
    w0: Array,
    factors: Factors,
    *,
    kernel: Kernel,
    gate: str,
    layout: Layout | None,
    path: str,
    sharding: Any,
) -> str | None:
    """Returns why there are no kernels for a call, or None if there are."""
    from snella_jax.ops.pallas import target, tile

    dtypes = {v.dtype for v in (x, w0, *factors.values())}
    rank = factors["a"].shape[0] * factors["a"].shape[-1]
    meshes = [
        m for m in (get_abstract_mesh(), jax.typeof(x).sharding.mesh) if not m.empty
    ]
    manual = bool(meshes) and all(mesh.are_all_axes_manual for mesh in meshes)
    platform = target.current()
    narrow = {jnp.dtype(name) for name in ("bfloat16", "float16", "float32")}
    refusals = [
        (path != "merged", f'path={path!r}: expected "merged"'),
        (
            not _has_form(kernel),
            f'{kernel}: expected mix_k or piecewise_linear over "out", with all means '
            'and start="kernel"',
        ),
        (gate not in tile.GATES, f"gate={gate!r}: expected {', '.join(tile.GATES)}"),
        (not _is_matrix(layout), f"{layout}: expected one matrix [n, m]"),
        (not dtypes <= narrow, f"{_names(dtypes)}: expected at most float32"),
        (rank > LARGEST_RANK, f"rank={rank}: expected at most {LARGEST_RANK}"),
        (sharding is not None, "delta has a sharding: kernels work on one device"),
        (
            bool(meshes) and not manual,
            "a mesh whose axes are not manual: expected jax.shard_map",
        ),
        (
            platform is None,
            f"{jax.default_backend()}: expected a TPU from v5e or an NVIDIA GPU from "
            "Hopper on",
        ),
        (
            not manual and not target.is_assumed() and jax.device_count() > 1,
            f"{jax.device_count()} devices: expected one, or jax.shard_map",
        ),
        (
            platform is not None
            and platform.platform == "gpu"
            and not platform.interpret
            and bool(w0.shape[-2] % 8 or w0.shape[-1] % 64),  # for tiles to be copied
            f"{w0.shape[-2:]} on a GPU: expected multiples of 8 and 64",
        ),
    ]
    return next((words for refused, words in refusals if refused), None)


@functools.cache
def fall_back(why: str) -> None:
    """Logs once why the plain code runs."""
    log.warning(
        'implementation="pallas" falls back to "xla": there is no kernel for %s.', why
    )


def _has_form(kernel: Kernel) -> bool:
    needed = {"normalize_over": "out", "centred": "none", "start": "kernel"}
    return type(kernel) in (kernels.mix_k, kernels.piecewise_linear) and all(
        getattr(kernel, name, value) == value for name, value in needed.items()
    )


def _is_matrix(layout: Layout | None) -> bool:
    if layout is None:
        return True
    axes = (layout.slices, len(layout.inputs), len(layout.outputs))
    return axes == ((), 1, 1) and layout.order in (None, (0, 1))


def _names(dtypes: set[Any]) -> str:
    return ", ".join(sorted(map(str, dtypes)))


@dataclasses.dataclass(frozen=True)
class Product:
    """`x @ (w0 + delta)` by fused kernels: static, equal by value.

    Attributes:
      form: what the update is made of.
      target: platform of the kernels.
      fixed: True if the coefficients of the pieces do not train.
    """

    form: "Form"
    target: "Target"
    fixed: bool

    @classmethod
    def of(cls, kernel: Any, gate: str) -> "Product":
        """Makes the product of a kernel and a gate, on the platform at hand."""
        from snella_jax.ops.pallas import target, tile

        softmax = isinstance(kernel, kernels.mix_k)
        temperature = softmax and kernel.temperature
        form = tile.Form(kernel.pieces, softmax, temperature, gate)
        where = target.current()
        assert where is not None
        return cls(form, where, not kernel.learn_piece_coeff)

    def forward(self, x: Array, w0: Array, factors: Factors, budget: Array) -> Any:
        """Returns the product, and what was found on the way: small."""
        from snella_jax.ops.pallas import matrix

        with jax.named_scope("snella_threshold"):
            found = matrix.find(self.form, factors, budget, self.target)
        found = jax.tree.map(marked, found)
        y = matrix.product(self.form, _flat(x), w0, factors, found, self.target)
        return y.reshape(*x.shape[:-1], w0.shape[1]), found

    def of_input(self, g: Array, w0: Array, factors: Factors, found: Any) -> Array:
        """Returns the gradient of `x`."""
        from snella_jax.ops.pallas import matrix

        operands = _flat(g), w0, factors, found, self.target, True
        return matrix.product(self.form, *operands).reshape(*g.shape[:-1], len(w0))

    def of_factors(self, x: Array, g: Array, factors: Factors, found: Any) -> Factors:
        """Returns the gradients of the factors."""
        from snella_jax.ops.pallas import matrix

        operands = _flat(x), _flat(g), factors, found, self.target
        grads = matrix.gradients(self.form, *operands)
        if self.fixed:
            grads["piece_coeff"] = jnp.zeros_like(grads["piece_coeff"])
        return grads


def fused(product: Product, sketched: Callable | None = None) -> Callable[..., Array]:
    """Makes a product that keeps its arguments for the way back, and what it found.

    Args:
      product: product by kernels.
      sketched: `(key, rows, g)` to sketches of `x` and of the cotangent, where `rows`
        are kept and not `x`; None for both as they are.

    Returns:
      A function of `x`, `rows` (or None), `w0`, factors, budget and key.
    """

    @jax.custom_vjp
    def run(x, rows, w0, factors, budget, key):
        return product.forward(x, w0, factors, budget)[0]

    def keep(x, rows, w0, factors, budget, key):
        y, found = product.forward(x, w0, factors, budget)
        return y, (x if sketched is None else rows, w0, factors, key, found)

    def pull(kept, g):
        (x, w0, factors, key, found), g = behind_one_barrier(kept, g)
        dx = product.of_input(g, w0, factors, found)
        if sketched is not None:
            x, g = sketched(key, x, g)
        grads = product.of_factors(x, g, factors, found)
        # Of a dense layer; XLA drops it where nothing asks for it.
        dw0 = jnp.matmul(_flat(x).T, _flat(g)).astype(w0.dtype)
        return dx, None, dw0, grads, None, None

    run.defvjp(keep, pull)
    return run


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
