"""Which arguments of a traced function are weights, by what it does with them."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from snella_jax.linen.dataflow import NOTHING, Dataflow, mark, region

X = jnp.ones((4, 3))
IDS = jnp.arange(4)


def flow(function, *weights, inputs=(X,)):
    names = "abc"[: len(weights)]
    program = jax.make_jaxpr(function)(*weights, *inputs)
    return Dataflow.of(program, [*names, *(None for _ in inputs)])


def loop(a, x):
    def body(carry):
        index, w, x = carry
        return index + 1, w, jnp.tanh(x @ w)

    return lax.while_loop(lambda carry: carry[0] < 2, body, (0, a, x))


def scan(a, x):
    return lax.scan(lambda x, w: (x @ w.astype(x.dtype).T, None), x, a)


def branches(a, b, x):
    return lax.cond(x.sum() > 0, lambda x: x @ a, lambda x: x @ b, x)


def own_rule(a, x):
    @jax.custom_vjp
    def run(a, x):
        return x @ a

    run.defvjp(lambda a, x: (x @ a, None), lambda _, g: (g, g))
    return run(a, x)


SQUARE = jnp.ones((3, 3))


@pytest.mark.parametrize(
    ("function", "weights", "multiplied"),
    [
        (lambda a, x: x @ a[0].T.reshape(3, 3), [jnp.ones((2, 3, 3))], "a"),
        (lambda a, x: jax.vmap(lambda w: x @ w)(a), [jnp.ones((2, 3, 3))], "a"),
        (jax.checkpoint(lambda a, x: jax.jit(jnp.dot)(x, a)), [SQUARE], "a"),
        (loop, [SQUARE], "a"),
        (scan, [jnp.ones((2, 3, 3))], "a"),
        (branches, [SQUARE, SQUARE], "ab"),
        (own_rule, [SQUARE], "a"),
        (lambda a, x: x @ (a / jnp.linalg.norm(a)), [SQUARE], "a"),
        (lambda a, b, x: x @ jnp.concatenate([a, b], 1), [SQUARE, SQUARE], "ab"),
        (lambda a, x: a[jnp.argmax(x, 1)] @ x[..., None], [jnp.ones((3, 3, 3))], "a"),
        (lambda a, x: lax.conv(x[None, None], a, (1, 1), "SAME"),
         [jnp.ones((1, 1, 2, 2))], "a"),
        # Added, scaled, multiplied with another weight only, or not at all.
        (lambda a, x: (x + a) * a, [jnp.ones((1, 3))], ""),
        (lambda a, b, x: x + a @ b, [SQUARE[:1], SQUARE], ""),
        (lambda a, b, x: x @ (a @ b), [SQUARE, SQUARE], ""),
        (lambda a, x: (x @ x.T).sum() + a, [SQUARE], ""),
        # Looked up.
        (lambda a, x: a[jnp.argmax(x, 1)] @ x.T, [SQUARE], ""),
        (lambda a, x: jax.nn.one_hot(jnp.argmax(x, 1), 3) @ a, [SQUARE], ""),
    ],
)  # fmt: skip
def test_what_multiplies_the_input(function, weights, multiplied):
    assert sorted(flow(function, *weights).multiplied) == list(multiplied)


def test_what_is_looked_up():
    def both(a, b, x):
        return a[jnp.argmax(x, 1)] + jax.nn.one_hot(jnp.argmax(x, 1), 3) @ b

    assert flow(both, SQUARE, SQUARE).looked_up == {"a", "b"}


def test_state_is_neither_weight_nor_input():
    program = jax.make_jaxpr(lambda a, s, x: x @ (a * s) + s @ a)(SQUARE, SQUARE, X[:3])
    found = Dataflow.of(program, ["a", NOTHING, None])
    assert list(found.multiplied) == ["a"] and len(found.multiplied["a"]) == 1


def test_marks_and_regions():
    def function(a, b, x):
        for number, value in enumerate((a, a.T.T, a.T, 2 * a, a + b)):
            mark(value, number)
        with region(7):
            y = jax.jit(lambda x: jax.checkpoint(lambda x: x @ a)(x))(x)
        return y @ a

    found = flow(function, SQUARE, SQUARE)
    assert found.multiplied["a"] == [{7}, set()]
    origins = [found.marked[number] for number in range(5)]
    assert [origin.moved for origin in origins] == ["a", "a", "a", None, None]
    assert [origin.turned() for origin in origins] == [False, False, True, False, False]
    assert origins[4].sources == {"a", "b"}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_scan_takes_an_axis_of_a_weight_away(axis):
    def body(x, w):
        mark(w, 0)
        return x @ w, None

    def function(a, x):
        return lax.scan(body, x, jnp.moveaxis(a, axis, 0))

    origin = flow(function, jnp.ones((3, 3, 3))).marked[0]
    assert origin.axes == tuple(i for i in range(3) if i != axis)
    assert origin.moved == "a" and not origin.turned()
