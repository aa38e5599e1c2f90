"""The programs of the README and of docs, as they stand there, for one's own models."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from places import ROOT

import snella_jax as snella
from snella_jax import linen

README = ROOT / "README.md"


class Counting:
    """The module `jax`, but that `jit` counts how often it traces its function."""

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


def program() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    (found,) = (block for block in blocks if block.startswith("import jax, optax"))
    return found


def trained(model, config, x, y, epochs):
    """Everything that the program has named, from the optimizer on.

    `adapted` is the trained model, `model` what it is merged to.
    """
    _, first, rest = program().partition("graphdef, trainable, budgets, frozen =")
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
    """Everything that docs/adapters.md names, from the split to the end of training.

    `given`: `variables`, `inputs`, `targets`, `config` and `epochs`.
    """
    page = (ROOT / "docs/adapters.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    (block,) = (b for b in blocks if b.startswith("import flax.linen"))
    _, first, rest = block.partition("trainable, budgets, frozen =")
    training, _, _ = (first + rest).partition("params = linen.join(")
    space = {"jax": Counting(), "linen": linen, "optax": optax, "snella": snella}
    space |= {"adapters": adapters, "params": params, **given}
    exec(training, space)
    parts = (space[name] for name in ("trainable", "budgets", "frozen"))
    return space | {"params": linen.join(*parts), "traces": space["jax"].traces}
