"""Sparse delta files: exact there and back, by the library and by NumPy alone."""

import random
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from every_kind import Every, assert_same, every, leaves, outputs, trained
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from places import ASSETS, ROOT

import snella_jax as snella

DOCS = ROOT / "docs" / "adapters.md"


@pytest.fixture(scope="module")
def models():
    base = Every(nnx.Rngs(0))
    return base, snella.merge(trained(every()))


@pytest.fixture
def path(models, tmp_path):
    snella.save_delta(tmp_path / "delta.safetensors", *models)
    return tmp_path / "delta.safetensors"


def by_name(model):
    return {name: value for name, (_, value) in leaves(model).items()}


def test_there_and_back_are_exact(models, path):
    base, merged = models
    before = leaves(base)
    assert_same(snella.apply_delta(base, path), merged)
    back = snella.unmerge(merged, path)
    assert_same(back, base)
    np.testing.assert_array_equal(outputs(back), outputs(base))
    after = leaves(base)
    assert all(np.array_equal(before[p][1], after[p][1]) for p in before)


def test_every_way_round_is_exact(models, path, tmp_path):
    """Adapter, merged, delta file, unmerged, adapter again: the same bits."""
    base, _ = models
    model = trained(every())
    snella.save(model, tmp_path / "adapter")
    merged = snella.apply_delta(base, path)
    assert_same(merged, snella.merge(model))
    again = snella.load(snella.unmerge(merged, path), tmp_path / "adapter")
    assert_same(again, model)
    np.testing.assert_array_equal(outputs(again), outputs(model))
    assert_same(snella.merge(again), merged)


def test_a_sharded_model_stays_where_it_lies(models, path):
    base, merged = models
    mesh = jax.make_mesh((4,), ("model",))
    spread = NamedSharding(mesh, PartitionSpec())
    model = nnx.clone(base)
    nnx.update(model, jax.device_put(nnx.state(model, nnx.Param), spread))
    tuned = snella.apply_delta(model, path)
    assert_same(tuned, merged)
    for _, own in nnx.to_flat_state(nnx.state(tuned, nnx.Param)):
        assert own[...].sharding.is_equivalent_to(spread, own.ndim)


def test_numpy_alone_applies_it(models, path):
    """The lines in docs/adapters.md, as they stand there."""
    base, merged = models
    (code,) = re.findall(
        r"```python\n(import json.*?)```", DOCS.read_text("utf-8"), re.S
    )
    names = {}
    exec(code, names)
    weights = {name: value.copy() for name, value in by_name(base).items()}
    names["apply_delta"](weights, path)
    for name, value in by_name(merged).items():
        np.testing.assert_array_equal(weights[name], value)
    names["apply_delta"](weights, path)  # again: back
    for name, value in by_name(base).items():
        np.testing.assert_array_equal(weights[name], value)


DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moved", [0, 1, 9, 300, 599, 600])
def test_any_dtype_and_any_density(dtype, moved, tmp_path):
    rng = np.random.default_rng(moved)
    before = rng.normal(size=(20, 30), scale=20).astype(dtype)
    after = before.copy()
    places = rng.permutation(600)[:moved]
    after.ravel()[places] = -after.ravel()[places] + np.ones((), dtype)
    path = tmp_path / "delta.safetensors"
    snella.save_delta(path, {"w": before}, {"w": after})
    found = snella.apply_delta({"w": before}, path)["w"]
    assert found.dtype == after.dtype
    np.testing.assert_array_equal(found.view(np.uint8), after.view(np.uint8))
    back = snella.unmerge({"w": after}, path)["w"]
    np.testing.assert_array_equal(back.view(np.uint8), before.view(np.uint8))


def test_places_are_written_in_the_smaller_way(tmp_path):
    """A bitmap takes n/8 bytes, an index 4: indices below a density of 1/32."""
    sizes = {}
    before = np.zeros(64_000, np.float32)
    for moved in (10, 1_900, 2_100, 20_000, 64_000):
        after = before.copy()
        after[np.random.default_rng(0).permutation(64_000)[:moved]] = 1
        path = tmp_path / f"{moved}.safetensors"
        snella.save_delta(path, {"w": before}, {"w": after})
        sizes[moved] = path.stat().st_size
    for moved, places in (
        (10, 40),
        (1_900, 7_600),
        (2_100, 8_000),
        (20_000, 8_000),
        (64_000, 0),
    ):
        assert 0 < sizes[moved] - 4 * moved - places < 600


def test_arrays_may_lie_in_memory_as_they_like(tmp_path):
    rng = np.random.default_rng(0)
    before = {"w": rng.normal(size=(4, 6)).T, "b": np.ones(3)}
    after = {"w": before["w"] + 1, "b": np.ones(3), "head": rng.normal(size=(2, 5)).T}
    path = tmp_path / "delta.safetensors"
    snella.save_delta(path, before, after)
    found = snella.apply_delta(before, path)
    assert all(np.array_equal(found[name], after[name]) for name in after)
    (code,) = re.findall(
        r"```python\n(import json.*?)```", DOCS.read_text("utf-8"), re.S
    )
    names = {}
    exec(code, names)
    names["apply_delta"](before, path)
    assert all(np.array_equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize("order", [">", "<"])
@pytest.mark.parametrize("kind", ["f4", "f8", "f2", "i2"])
def test_arrays_may_have_any_byte_order(kind, order, tmp_path):
    """HDF5, FITS and `.npy` files of other machines have big-endian arrays."""
    rng, dtype = np.random.default_rng(0), f"{order}{kind}"
    before = {"w": rng.normal(size=(4, 6), scale=50).astype(dtype), "b": np.ones(3)}
    after = {"w": before["w"].T.copy().T, "b": np.ones(3), "head": np.ones(2, dtype)}
    after["w"][1] += np.ones((), dtype)
    path = tmp_path / "delta.safetensors"
    snella.save_delta(path, before, after)
    native = {name: value.astype(value.dtype.newbyteorder("=")) for name, value in
              before.items()}  # fmt: skip
    (code,) = re.findall(
        r"```python\n(import json.*?)```", DOCS.read_text("utf-8"), re.S
    )
    names = {}
    exec(code, names)
    for weights in (before, native):
        found = snella.apply_delta(weights, path)
        assert all(np.array_equal(found[name], after[name]) for name in after)
        back = snella.unmerge(found, path)
        assert all(np.array_equal(back[name], before[name]) for name in back)
        alone = {name: value.copy() for name, value in weights.items()}
        names["apply_delta"](alone, path)
        assert all(np.array_equal(alone[name], after[name]) for name in after)


def test_other_weights_that_it_does_not_change_are_refused(models, path, caplog):
    base, merged = models
    other = nnx.clone(base)
    other.norm.scale[...] += 1
    message = "for another base: norm/scale, which it does not change, has another SHA"
    refused(snella.apply_delta, other, path, message)
    found = snella.apply_delta(other, path, allow_base_mismatch=True)
    assert "norm/scale, which it does not change" in caplog.text
    np.testing.assert_array_equal(found.qkv.kernel[...], merged.qkv.kernel[...])
    np.testing.assert_array_equal(found.norm.scale[...], other.norm.scale[...])
    after = nnx.clone(merged)
    after.norm.bias[...] += 1
    refused(snella.unmerge, after, path, "norm/bias, which it does not change")
    some = {n: v for n, v in by_name(base).items() if not n.startswith("norm/bias")}
    found = snella.apply_delta(some, path)  # a part, as before
    assert found.keys() == some.keys()


def test_files_of_before_say_nothing_of_what_they_do_not_change(caplog):
    """Format 1, which has such a delta file: `tests/assets/adapters/make.py`."""
    data = ASSETS / "adapters" / "format1"
    with np.load(data / "base.npz") as arrays:
        base = dict(arrays)
    base["norm/scale"] = base["norm/scale"] + 1
    snella.apply_delta(base, data / "delta.safetensors")
    assert "was not compared" in caplog.text


def test_a_new_head_is_written_whole(tmp_path):
    before = {"w": np.zeros((2, 2), np.float32), "head": np.zeros((2, 3), np.float32)}
    after = {"w": before["w"], "head": np.ones((2, 5), np.float32), "b": np.ones(3)}
    path = tmp_path / "delta.safetensors"
    snella.save_delta(path, before, after)
    found = snella.apply_delta(before, path)
    assert found.keys() == after.keys()
    assert all(np.array_equal(found[name], after[name]) for name in after)
    assert snella.unmerge(after, path).keys() == {"w"}


def refused(function, weights, path, message):
    with pytest.raises(snella.CheckpointError, match=message) as error:
        function(weights, path)
    assert str(path) in str(error.value)


def test_other_weights_are_refused(models, path):
    base, merged = models
    refused(snella.apply_delta, merged, path, "is not the weight that it is for")
    refused(snella.unmerge, base, path, "is not the weight that it is for")
    some = by_name(base)
    some.pop("qkv/kernel")
    refused(snella.apply_delta, some, path, "these weights have no qkv/kernel")
    with pytest.raises(FileNotFoundError):
        snella.apply_delta(base, path.parent / "nothing")


def test_what_cannot_be_written_is_said(models, tmp_path):
    base, _ = models
    path = tmp_path / "delta.safetensors"
    with pytest.raises(ValueError, match=r"give snella\.merge"):
        snella.save_delta(path, base, every())
    with pytest.raises(ValueError, match="are gone: b"):
        snella.save_delta(path, {"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(2)})
    with pytest.raises(ValueError, match="was float64 and is float32"):
        snella.save_delta(path, {"a": np.ones(2)}, {"a": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="a: expected arrays by name, not nested"):
        snella.save_delta(path, {"a": {"b": np.ones(2)}}, {"a": {"b": np.ones(2)}})
    assert not list(tmp_path.iterdir())


def test_no_damage_goes_unnoticed(models, path):
    base, merged = models
    arrays, expected = by_name(base), by_name(merged)
    content = path.read_bytes()
    rng = random.Random(0)
    cases = []
    for place in [*rng.sample(range(len(content)), 100), *range(8)]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        cases.append(bytes(flipped))
    cases += [content[:cut] for cut in rng.sample(range(len(content)), 50)]
    cases += [
        content[:p] + rng.randbytes(1) + content[p:]
        for p in rng.sample(range(len(content)), 50)
    ]
    cases = [case for case in cases if case != content]
    assert len(cases) >= 200
    for case in cases:
        path.write_bytes(case)
        try:
            snella.apply_delta(arrays, path)
        except snella.CheckpointError as error:
            assert str(path) in str(error)
        else:
            raise AssertionError("damage went unnoticed")
    path.write_bytes(content)
    found = snella.apply_delta(arrays, path)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_bfloat16_base_is_moved_exactly(tmp_path):
    config = snella.SnellaConfig(
        rank=4, targets="fc", trainable="", allocation="fixed", target_density=0.3
    )

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(16, 24, param_dtype=jnp.bfloat16, rngs=rngs)

    base = Net(nnx.Rngs(0))
    merged = snella.merge(snella.adapt(base, config, rngs=nnx.Rngs(1)))
    path = tmp_path / "delta.safetensors"
    snella.save_delta(path, base, merged)
    assert_same(snella.apply_delta(base, path), merged)
    assert_same(snella.unmerge(merged, path), base)
    moved = np.asarray(jnp.count_nonzero(merged.fc.kernel[...] != base.fc.kernel[...]))
    bits = 2 * int(moved) + 16 * 24 // 8
    assert bits < path.stat().st_size < bits + 700
    assert isinstance(base.fc.kernel[...], jax.Array)
