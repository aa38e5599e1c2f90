"""A user's program, whose types pyright checks against the installed package."""

from typing import assert_type

import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

import snella_jax as snella
from snella_jax.models import vit

config = snella.SnellaConfig(rank=8, target_density=0.3, trainable="head")
base = vit.create("vit_ti16", depth=1, image_size=32, num_classes=10, rngs=nnx.Rngs(0))
assert_type(base, vit.ViT)
state = snella.Tuning.create(
    base, config, optax.adamw(2e-3), epochs=2, steps_per_epoch=1, rngs=nnx.Rngs(1)
)
assert_type(state, snella.Tuning)


def loss_fn(model: vit.ViT, batch: tuple[Array, Array]) -> Array:
    """Returns the cross entropy of a batch."""
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


for _ in range(2):
    state, loss = state.step(loss_fn, (jnp.ones((2, 32, 32, 3)), jnp.arange(2)))
    state = state.end_of_epoch()
    print(f"{float(loss):.3f}")
assert_type(state, snella.Tuning)

adapted = snella.adapt(base, config, rngs=nnx.Rngs(1))
graphdef, trainable, budgets, frozen = snella.partition(adapted)
assert_type(trainable, nnx.State)
plain = snella.merge(adapted, unmoved_budgets=True)
assert_type(plain, vit.ViT)
print(plain(jnp.ones((1, 32, 32, 3))).shape)
