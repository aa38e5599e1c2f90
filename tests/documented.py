"""The README's whole program, as it stands there, for models of one's own."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import snella_jax as snella

README = Path(__file__).parent.parent / "README.md"


def program() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    (found,) = (block for block in blocks if block.startswith("import jax, optax"))
    return found


def trained(model, config, x, y, epochs):
    """Everything that the program has named, from the optimizer on.

    `adapted` is the trained model, `model` what it is merged to.
    """
    _, first, rest = program().partition("graphdef, trainable, budgets, frozen =")
    space = {"jax": jax, "jnp": jnp, "nnx": nnx, "optax": optax, "snella": snella}
    space |= {"model": model, "config": config, "x": x, "y": y, "epochs": epochs}
    exec(first + rest, space)
    parts = (space[name] for name in ("graphdef", "trainable", "budgets", "frozen"))
    return space | {"adapted": nnx.merge(*parts, copy=True)}
