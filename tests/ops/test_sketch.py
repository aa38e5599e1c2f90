"""Sketches of rows: all draws together give the product, and examples draw apart."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from snella_jax.ops.readers import kept_once, new_keys
from snella_jax.ops.sketch import Sketch

# Rows of an example, s and the rows always kept: also T < s, T = 1 and no rest.
CASES = [(8, 4, ()), (7, 3, ()), (3, 4, ()), (1, 4, ()), (7, 2, (1, 3)), (2, 4, (0, 1))]


def rows_of(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape))


def every_draw(sketch, rows):
    """All that `draw` can return for one example."""
    rest = rows - len(sketch.keep_rows)
    k = math.ceil(rest / sketch.factor)
    if sketch.kind == "strided":
        signs = itertools.product((-1, 1), repeat=sketch.factor * k)
        signs = np.array(list(signs))
        return signs.reshape(len(signs), sketch.factor, k)
    ends = [range(min(sketch.factor, rest - sketch.factor * i)) for i in range(k)]
    return np.array(list(itertools.product(*ends)), int).reshape(
        math.prod(map(len, ends)), k
    )


@pytest.mark.parametrize("kind", ["sample", "strided"])
@pytest.mark.parametrize("rows, factor, keep", CASES)
def test_all_draws_together_are_exact(kind, rows, factor, keep, x64, monkeypatch):
    """The mean of `(S x)^T (S g)` over all draws is `x^T g`, in float64."""
    if kind == "strided" and (rows, factor) == (8, 4):
        rows = 6  # of 256 draws
    sketch, x, g = Sketch(factor, kind, keep), rows_of(rows, 3), rows_of(rows, 2, 2)
    monkeypatch.setattr(Sketch, "draw", lambda self, draw, batch, rows: draw)

    def product(draw):
        kept = sketch.kept(draw, x, 0)
        small, other = sketch.of_both(draw, kept, g, 0)
        assert len(small) == len(other) == sketch.count(rows)
        return jnp.einsum("tn,tij->nij", small, other)

    draws = jnp.asarray(every_draw(sketch, rows))
    got = jax.jit(jax.vmap(product))(draws).mean(0)
    expected = np.einsum("tn,tij->nij", x, g)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_draws_by_size_are_exact_on_average(x64):
    """Of "crs" over all starts, by a grid; kept rows count 1, those of 0 nothing."""
    sketch = Sketch(3, "crs", (2,))
    x, g = rows_of(7, 3), rows_of(7, 4).at[4].set(0)
    starts = (np.arange(6000) + 0.5) / 6000

    def product(start):
        uniform = lambda key, shape, dtype: jnp.full(shape, start, dtype)  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.random, "uniform", uniform)
            small, other = sketch.of_both(jax.random.key(0), x, g, 0)
        assert len(small) == 3  # row 2 and a third of the other six
        return small.T @ other

    got = jax.jit(jax.vmap(product))(jnp.asarray(starts)).mean(0)
    np.testing.assert_allclose(got, x.T @ g, rtol=0, atol=2e-3)
    nothing = sketch.of_both(jax.random.key(0), x, 0 * g, 0)[1]
    assert not nothing.any()


def test_each_example_draws_its_own_rows():
    """Exact copies, of every place in the runs, the same for the same key alone."""
    sketch, rows = Sketch(4), 10
    x = jnp.broadcast_to(jnp.arange(rows)[:, None], (3, 50, rows, 2))
    once, other = (sketch.of_input(jax.random.key(i), x, 2) for i in range(2))
    assert once.shape == (3, 50, 3, 2)
    places = np.array(once[..., 0]).reshape(-1, 3)
    for run, members in enumerate([range(4), range(4, 8), range(8, 10)]):
        assert set(places[:, run]) == set(members)
    assert len(np.unique(places, axis=0)) > 20  # of 32
    assert (once != other).any()
    np.testing.assert_array_equal(once, sketch.of_input(jax.random.key(0), x, 2))
    kept = Sketch(4, keep_rows=(9, 0)).of_input(jax.random.key(0), x, 2)
    np.testing.assert_array_equal(kept[..., 0, 0], 0)
    np.testing.assert_array_equal(kept[..., 1, 0], 9)
    assert kept.shape == (3, 50, 4, 2) and set(np.ravel(kept[..., 2:, 0])) == {
        *range(1, 9)
    }


def test_infinities_in_rows_that_are_not_kept_stay_out():
    x = jnp.full((8, 2), jnp.inf).at[::4].set(1)
    sketch = Sketch(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sketch, "draw", lambda *_: jnp.zeros(2, jnp.int32))
        assert sketch.of_input(jax.random.key(0), x, 0).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"factor": 0}, "sketch=0"),
        ({"factor": 2.5}, "whole number"),
        ({"kind": "gaussian"}, "sample, strided, crs"),
        ({"keep_rows": (-1,)}, "from 0 on"),
        ({"keep_rows": (1, 1)}, "different positions"),
        ({"keep_rows": 0}, r"keep_rows=0: .*such as \(0,\)"),
        ({"keep_rows": (0.0,)}, "different positions"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sketch(**options)


def test_a_row_that_is_not_there():
    with pytest.raises(ValueError, match="no row 9"):
        Sketch(2, keep_rows=(0, 9)).kept(jax.random.key(0), rows_of(4, 2), 0)


# Keys of arrays that several layers read


KEYS = jax.random.split(jax.random.key(0), 3)
HALF = Sketch(2)


def test_readers_of_one_array_share_a_key_until_there_are_new_ones():
    x, y = rows_of(4, 2), rows_of(4, 2)
    new_keys()
    first, rows = kept_once(HALF, KEYS[0], x, x, 0)
    assert kept_once(HALF, KEYS[1], x, x, 0)[0] is first
    assert kept_once(HALF, KEYS[1], x, x, 0)[1] is rows
    assert kept_once(Sketch(4), KEYS[1], x, x, 0)[0] is first  # with rows of its own
    own = KEYS[1]
    assert kept_once(HALF, own, y, y, 0)[0] is own
    new_keys()
    assert kept_once(HALF, own, x, x, 0)[0] is own


def test_no_tracer_outlives_its_trace():
    """An array from outside is read in two traces, and outside again."""
    x = rows_of(4, 2)
    new_keys()

    @jax.jit
    def inside(key):
        return kept_once(HALF, key, x, x, 0)

    with jax.checking_leaks():
        for key in KEYS[:2]:
            used, _ = inside(key)
            assert used == key
            inside.clear_cache()
    own = KEYS[2]
    used, rows = kept_once(HALF, own, x, x, 0)
    assert used is own and isinstance(rows, jax.Array)


def test_readings_go_with_their_arrays():
    from snella_jax.ops import readers

    before = len(readers._readings)
    x = rows_of(4, 2)
    kept_once(HALF, KEYS[0], x, x, 0)
    assert len(readers._readings) == before + 1
    del x
    assert len(readers._readings) == before


@pytest.mark.parametrize(
    ("sketch", "refused"),
    [
        (Sketch(4), False),
        (Sketch(4, "strided"), False),
        (Sketch(4, keep_rows=(0,)), True),
        (Sketch(4, "crs"), True),
    ],
)
def test_rows_that_are_split_over_a_mesh(sketch, refused):
    """Those of a batch that is split are whole."""
    mesh = jax.make_mesh(
        (2,), ("rows",), (AxisType.Explicit,), devices=jax.devices()[:2]
    )
    key = jax.random.key(0)

    def traced(spec):
        whole = NamedSharding(mesh, spec)
        x = jax.ShapeDtypeStruct((2, 16, 3), jnp.float32, sharding=whole)
        with jax.set_mesh(mesh):
            jax.eval_shape(
                lambda x: sketch.of_both(key, sketch.kept(key, x, 1), x, 1), x
            )

    traced(PartitionSpec("rows"))
    if refused:
        with pytest.raises(
            ValueError, match="split along 'rows' of the mesh: keep_rows"
        ):
            traced(PartitionSpec(None, "rows"))
    else:
        traced(PartitionSpec(None, "rows"))
