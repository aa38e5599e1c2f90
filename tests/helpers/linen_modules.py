"""A Linen layer of one's own, and how tests adapt a module."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import snella_jax as snella
from snella_jax import linen

X = jax.random.normal(jax.random.key(0), (5, 8))
NORMAL = nn.initializers.normal(0.3)


def config(targets, **changes):
    settings = {"rank": 4, "trainable": "", "allocation": "fixed", "gate": "hard"}
    return snella.SnellaConfig(targets=targets, **(settings | changes))


def adapt(
    module, targets, *inputs, layouts=None, variables=None, density=0.3, **kwargs
):
    inputs = inputs or (X,)
    if variables is None:
        variables = module.init(jax.random.key(1), *inputs, **kwargs)
    own = config(targets, target_density=density)
    key = jax.random.key(2)
    found = linen.adapt(
        module, variables, own, *inputs, key=key, layouts=layouts, **kwargs
    )
    return variables, *found


class Own(nn.Module):
    """Several weights, methods, what is sown, dropped and returned."""

    def setup(self):
        self.up = self.param("up", NORMAL, (2, 8, 12))
        self.down = self.param("down", NORMAL, (12, 8))
        self.drop = nn.Dropout(0.5)

    def hidden(self, x):
        return jnp.tanh(x @ self.up[0]) * (x @ self.up[1])

    def __call__(self, x, train=False, *, kind="wide"):
        self.sow("intermediates", "x", x)
        y = self.drop(self.hidden(x), deterministic=not train) @ self.down
        return y, {"kind": kind, "largest": jnp.argmax(y), "none": None}
