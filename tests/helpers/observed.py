"""Trees of factors and gradients, and Eq. 7 to 11 in NumPy, for tests of importance."""

import jax.numpy as jnp
import numpy as np

from snella_jax import importance

SHAPES = {  # a and b of one plain matrix and of a stack of three
    "fc1": ((2, 6, 2), (2, 4, 2)),
    "blocks/query": ((3, 1, 5, 3), (3, 1, 7, 3)),
}


def tree(seed, dtype=jnp.float32):
    """Random parameters or gradients: two adapters and a head."""
    rng = np.random.default_rng(seed)

    def adapter(name):
        a, b = SHAPES[name]
        alpha = a[:-3]
        shapes = {"a": a, "b": b, "alpha": alpha}
        return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}

    return {
        "fc1": adapter("fc1"),
        "blocks": {"query": adapter("blocks/query")},
        "head": {"kernel": jnp.asarray(rng.normal(size=(4, 3)), dtype)},
    }


def at(params, path):
    for name in path.split("/"):
        params = params[name]
    return params


def expected_scores(thetas, grads, beta1, beta2, metric="sensitivity"):
    """Eq. 7 to 11 in float64 for the trees of every step."""
    scores = {}
    for path in SHAPES:
        total = 0
        for name in ("a", "b"):
            smooth = uncertain = None
            for theta, grad in zip(thetas, grads, strict=True):
                theta = np.float64(at(theta, path)[name])
                grad = np.float64(at(grad, path)[name])
                seen = np.abs(theta * grad if metric == "sensitivity" else theta)
                if smooth is None:
                    smooth, uncertain = seen, np.zeros_like(seen)
                else:
                    smooth = beta1 * smooth + (1 - beta1) * seen
                    change = np.abs(smooth - seen)
                    uncertain = beta2 * uncertain + (1 - beta2) * change
            total += (smooth * uncertain).mean((-3, -2, -1))
        scores[path] = total
    return scores


def observe(tx, thetas, grads):
    """The state after one update for every pair of trees."""
    state = tx.init(thetas[0])
    for theta, grad in zip(thetas, grads, strict=True):
        _, state = tx.update(grad, state, theta)
    return state


def assert_scores(state, expected, rtol=2e-6):
    scores = importance(state)
    assert scores.keys() == expected.keys()
    for path, score in scores.items():
        assert score.dtype == np.float32
        assert score.shape == SHAPES[path][0][:-3]
        np.testing.assert_allclose(score, expected[path], rtol=rtol)


def broken(grads, value, path="fc1", name="a"):
    """The same gradients, with one number that is not finite."""
    at(grads, path)[name] = at(grads, path)[name].at[..., 0].set(value)
    return grads
