"""Parts of a batch: all of it, each once, with noise and a turn of its own."""

import jax
import jax.numpy as jnp
import pytest

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
