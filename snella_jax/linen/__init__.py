"""The Linen binding: adapts a module that someone else wrote, without touching it.

The adapters sit in `params` beside the kernels they belong to, which other collections
cannot do inside a `nn.scan`; `Adapters.apply` intercepts the calls of the layers and
finds them there, scanned, rematerialised or neither.

    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import snella_jax as snella
    >>> from snella_jax import linen
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.Dense(2, name="head")(nn.relu(nn.Dense(8, name="fc")(x)))
    >>> net, x = Net(), jnp.ones((1, 6))
    >>> variables = net.init(jax.random.key(0), x)
    >>> config = snella.SnellaConfig(rank=4, targets="fc", trainable="head")
    >>> adapters, params = linen.adapt(net, variables, config, x, key=jax.random.key(1))
    >>> trainable, budgets, frozen = adapters.partition(params)
    >>> def logits(trainable, budgets, frozen, x):
    ...     return adapters.apply({"params": linen.join(trainable, budgets, frozen)}, x)
    >>> logits(trainable, budgets, frozen, x).shape
    (1, 2)
"""

from snella_jax.linen.binding import Adapters, adapt, join, load

__all__ = ["Adapters", "adapt", "join", "load"]
