"""Parts of a batch: all of it, each once, with noise and a turn of its own."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import snella_jax as snella
from snella_jax.tuning.accumulation import mean_over_parts

KEY = jax.random.key(3)


def test_many_parts_in_bfloat16_have_their_mean():
    """A sum of 512 ones in bfloat16 would stop at 256."""

    def gradient(carried, part, key):
        return carried, part.mean()

    batch = jnp.ones(512, jnp.bfloat16)
    _, mean = mean_over_parts(gradient, 512, None, batch, KEY)
    assert mean.dtype == jnp.bfloat16 and float(mean) == 1


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_are_all_of_the_batch_and_draw_noise_of_their_own(parts):
    def gradient(turn, batch, key):
        grads = {"x": batch["image"].sum(), "y": batch["label"].mean()}
        return 2 * turn, (jax.random.uniform(key), grads)

    images, labels = jnp.arange(12.0).reshape(6, 2), jnp.arange(6.0) ** 2
    batch = {"image": images, "label": labels}
    turn, (loss, grads) = mean_over_parts(gradient, parts, 1, batch, KEY)
    draws = [jax.random.uniform(key) for key in jax.random.split(KEY, parts)]
    assert len(set(map(float, draws))) == parts and int(turn) == 2**parts
    assert float(loss) == pytest.approx(float(sum(draws)) / parts)
    assert float(grads["x"]) == pytest.approx(66 / parts)
    assert float(grads["y"]) == pytest.approx(55 / 6)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, x: (model(x).mean(), x), "a tuple of 2: expected one scalar"),
        (lambda model, x: model(x), r"an array of shape \(8, 3\): expected one scalar"),
    ],
)
def test_a_loss_is_one_scalar(loss_fn, message):
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs))
    config = snella.SnellaConfig(rank=4, targets="layers/0", trainable="layers/1")
    length = {"epochs": 2, "steps_per_epoch": 1}
    state = snella.Tuning.create(
        net, config, optax.sgd(0.1), **length, rngs=nnx.Rngs(2)
    )
    with pytest.raises(TypeError, match=message):
        state.step(loss_fn, jnp.ones((8, 6)))
    with pytest.raises(TypeError, match="model is a Tuning: expected an NNX module"):
        snella.save(state, "nowhere")
