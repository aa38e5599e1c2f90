"""The programs of the README and of docs, as they stand there."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from places import ROOT

import snella_jax as snella
from snella_jax import linen


class Counting:
    """The module `jax` with a `jit` that counts how often it traces its function."""

    def __init__(self):
        self.traces = 0

    def __getattr__(self, name):
        return getattr(jax, name)

    def jit(self, function):
        @functools.wraps(function)
        def traced(*args):
            self.traces += 1
            return function(*args)

        return jax.jit(traced)


def blocks(page: str) -> list[str]:
    """Returns the Python programs of a page, a path from the project's root."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S)


def trained(model, config, x, y, epochs):
    """Trains by the loop of docs/quickstart.md, and returns all that it has named.

    `adapted` is the trained model, `model` what it is merged to.
    """
    _, program = blocks("docs/quickstart.md")
    _, first, rest = program.partition("graphdef, trainable, budgets, frozen =")
    space = {
        "jax": Counting(),
        "jnp": jnp,
        "nnx": nnx,
        "optax": optax,
        "snella": snella,
    }
    space |= {"model": model, "config": config, "x": x, "y": y, "epochs": epochs}
    exec(first + rest, space)
    parts = (space[name] for name in ("graphdef", "trainable", "budgets", "frozen"))
    made = {"adapted": nnx.merge(*parts, copy=True), "traces": space["jax"].traces}
    return space | made


def trained_linen(adapters, params, **given):
    """Trains by the Linen program of docs/adapters.md, and returns all it has named.

    `given`: `variables`, `inputs`, `targets`, `config` and `epochs`.
    """
    found = (b for b in blocks("docs/adapters.md") if b.startswith("import flax.linen"))
    (block,) = found
    _, first, rest = block.partition("trainable, budgets, frozen =")
    training, _, _ = (first + rest).partition("params = linen.join(")
    space = {"jax": Counting(), "linen": linen, "optax": optax, "snella": snella}
    space |= {"adapters": adapters, "params": params, **given}
    exec(training, space)
    parts = (space[name] for name in ("trainable", "budgets", "frozen"))
    return space | {"params": linen.join(*parts), "traces": space["jax"].traces}
