"""The platform that kernels are made for, and how a test or a compiler says another."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax

SMALL_TPUS = ("TPU v2", "TPU v3", "TPU v4")  # tiles do not fit their 16 or 32 MiB


@dataclasses.dataclass(frozen=True)
class Target:
    """A platform that there are kernels for; static, equal by value.

    Attributes:
      platform: "tpu" (from v5e on) or "gpu" (NVIDIA, from Hopper on).
      interpret: True to run the kernels as plain JAX, on any platform: for tests.
      tile: sizes of a tile, `(inputs, outputs, tokens)`; None for the kernels' own.
    """

    platform: Literal["tpu", "gpu"]
    interpret: bool = False
    tile: tuple[int, int, int] | None = None


_assumed: contextvars.ContextVar[Target | None] = contextvars.ContextVar(
    "snella_jax_pallas_target", default=None
)


@contextlib.contextmanager
def assumed(target: Target) -> Iterator[None]:
    """Makes kernels for a target, wherever JAX runs: to interpret, or to compile only.

    Holds while a function is traced, so inside a `jax.jit` that was not called before.
    """
    token = _assumed.set(target)
    try:
        yield
    finally:
        _assumed.reset(token)


def is_assumed() -> bool:
    """Returns True inside `assumed`."""
    return _assumed.get() is not None


def current() -> Target | None:
    """Returns the target of calls that are traced now, or None if it has no kernels.

    >>> with assumed(Target("tpu", interpret=True)):
    ...     current().platform
    'tpu'
    """
    target = _assumed.get()
    if target is not None:
        return target
    match jax.default_backend():
        case "tpu" if not jax.devices()[0].device_kind.startswith(SMALL_TPUS):
            return Target("tpu")
        case "gpu" if _is_hopper(jax.devices()[0]):
            return Target("gpu")
    return None


def _is_hopper(device: Any) -> bool:
    """Returns True for an NVIDIA GPU that copies tiles by itself: Hopper or later."""
    if "cuda" not in device.client.platform_version.lower():
        return False
    return int(device.compute_capability.split(".")[0]) >= 9
