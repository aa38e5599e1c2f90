"""Sums over weights: whatever the parts, devices, axes and stacks they are read in."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from snella_jax import Layout
from snella_jax.adapters.fingerprint import MIX, STEP, Fingerprint, row_totals, total
from snella_jax.files.hosts import parts

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.float32, BFLOAT16, np.float64, np.int8, np.bool_, np.complex64]


def drawn(dtype, shape=(4, 6, 8)):
    rng = np.random.default_rng(0)
    if np.dtype(dtype).kind == "c":
        return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(dtype)
    return rng.normal(size=shape, scale=3).astype(dtype)


def by_hand(array):
    """Computes the documented sum, number by number, in Python's integers."""
    size, found = array.dtype.itemsize, 0
    for place, number in enumerate(array.reshape(-1)):
        x = int.from_bytes(number.tobytes(), "little") + place * int(STEP)
        for factor in map(int, MIX):
            x = x * factor % 2**64
            x ^= x >> 32
        found += x
    assert size <= 8
    return found % 2**64


@pytest.mark.parametrize("dtype", DTYPES[:-1])
def test_the_sum_is_what_it_is_said_to_be(dtype):
    array = drawn(dtype)
    found = Fingerprint.of(array)
    assert found.places[str(array.dtype)] == by_hand(array)
    for narrow in set(found.places) - {str(array.dtype)}:
        assert found.places[narrow] == by_hand(array.astype(narrow))


@pytest.mark.parametrize("dtype", DTYPES)
def test_how_an_array_lies_in_memory_does_not_matter(dtype):
    array = drawn(dtype)
    expected = Fingerprint.of(array)
    others = [np.asfortranarray(array), array[::-1].copy()[::-1], jnp.asarray(array)]
    if dtype is not BFLOAT16:
        others.append(array.astype(array.dtype.newbyteorder(">")))
    for other in others[:2] if dtype is np.float64 else others:
        assert Fingerprint.of(other) == expected
    assert Fingerprint.from_json(expected.as_json()) == expected


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not np.bool_])
def test_any_other_number_or_place_is_seen(dtype):
    array = drawn(dtype)
    known = Fingerprint.of(array)
    for place in np.random.default_rng(1).permutation(array.size)[:20]:
        other = array.copy()
        bits = other.reshape(-1).view(f"u{array.dtype.itemsize}")
        bits[place] ^= 1  # the smallest change there is
        assert known.is_of(array) and not known.is_of(other)
        assert Fingerprint.of(other).numbers != known.numbers
    other = array[[1, 0, 2, 3]]
    assert not known.is_of(other) and Fingerprint.of(other).numbers == known.numbers


@pytest.mark.parametrize(
    "layout",
    [
        Layout((4,), (3, 8)),
        Layout((4,), (8,), (3,), order=(2, 0, 1)),
        Layout((4,), (6,)).split(3),
        Layout((4,), (3, 8)).split(3),
        Layout((2,), (6, 2)).split(3),
    ],
)
def test_places_are_those_in_the_matrices_of_a_weight(layout):
    rows = [drawn(np.float32, layout.shape) + i for i in range(2)]
    matrices = [Fingerprint.of(layout.matrices(row)).places["float32"] for row in rows]
    for axis in (0, 1):
        weight = np.stack(rows, axis)
        assert row_totals(weight, "float32", layout, (axis,)).tolist() == matrices


@pytest.mark.parametrize(
    "spec", [(), ("a",), (None, "b"), ("b", "a"), (None, None, ("a", "b"))]
)
def test_of_a_spread_weight_each_part_is_read_once(spec):
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    array = drawn(np.float32)
    spread = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert Fingerprint.of(spread) == Fingerprint.of(array)
    layout = Layout((6,), (8,))
    found = row_totals(spread, "bfloat16", layout, (0,))
    assert (found == row_totals(array, "bfloat16", layout, (0,))).all()
    found = list(parts(spread))
    cut = spread.addressable_shards[0].data.size
    assert {part.size for _, part in found} == {cut}
    assert sum(part.size for _, part in found) == array.size


def test_large_rows_and_none_at_all():
    wide = np.random.default_rng(0).normal(size=(3, 70_001)).astype(np.float32)
    halves = [wide[:, :40_000], wide[:, 40_000:]]
    sums = [int(total(half, "float32")) for half in halves]
    assert sum(sums) % 2**64 == int(total(wide, "float32"))
    assert Fingerprint.of(np.zeros((0, 3), np.float32)).places["float32"] == 0
    nothing = Fingerprint.of(np.zeros((0, 3), np.float32))
    assert nothing.is_stack_of([]) and not Fingerprint.of(wide).is_stack_of([])
    assert Fingerprint.of(np.float32(2)).is_of(jnp.float32(2))
