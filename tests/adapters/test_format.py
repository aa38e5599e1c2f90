"""Adapters as files: exact round trips, and bases that are others are refused."""

import contextlib
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import called
from every_kind import KINDS, Every, assert_same, every, leaves, outputs, trained
from flax import nnx
from jax.sharding import AxisType
from places import ASSETS
from safetensors.numpy import load_file

import snella_jax as snella
from snella_jax import models
from snella_jax.models import vit
from snella_jax.nnx import selection
from snella_jax.nnx.variables import variables_of

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SMALL = vit.ViTConfig(
    width=8, depth=3, heads=2, patch_size=4, image_size=8, channels=1, num_classes=3
)


@pytest.fixture(scope="module")
def model():
    return trained(every())


@pytest.fixture
def saved(model, tmp_path):
    folder = tmp_path / "adapter"
    snella.save(model, folder, base="our/base")
    return folder


def test_a_round_trip_is_exact(model, saved):
    base = Every(nnx.Rngs(0))
    before = leaves(base)
    loaded = snella.load(base, saved)
    assert_same(loaded, model)
    np.testing.assert_array_equal(outputs(loaded), outputs(model))
    assert {m.name: m for m in snella.sparsity(loaded)} == {
        m.name: m for m in snella.sparsity(model)
    }
    merged = snella.merge(loaded)
    np.testing.assert_array_equal(outputs(merged), outputs(snella.merge(model)))
    after = leaves(base)
    assert all(np.array_equal(before[p][1], after[p][1]) for p in before)
    shared = loaded.qkv.kernel[...].unsafe_buffer_pointer()
    assert shared == base.qkv.kernel[...].unsafe_buffer_pointer()


def test_budgets_of_0_are_saved_and_loaded(model, tmp_path):
    """A matrix that lost the competition is still there, and is the base's."""
    lost = nnx.clone(model)
    lost.qkv.adapter.budget[...] = jnp.array([0, 5, 0])
    lost.heads.adapter.budget[...] = jnp.zeros_like(lost.heads.adapter.budget[...])
    snella.save(lost, tmp_path / "a")
    loaded = snella.load(Every(nnx.Rngs(0)), tmp_path / "a")
    assert_same(loaded, lost)
    assert loaded.qkv.adapter.budget[...].tolist() == [0, 5, 0]
    plain, base = snella.merge(loaded), Every(nnx.Rngs(0))
    np.testing.assert_array_equal(plain.heads.kernel[...], base.heads.kernel[...])
    moved = (plain.qkv.kernel[...] != base.qkv.kernel[...]).reshape(6, 3, 4).sum((0, 2))
    assert moved.tolist() == [0, 5, 0]


def test_a_config_of_numpy_numbers_is_saved(tmp_path):
    kernel = snella.kernels.mix_k(pieces=np.int64(2))
    own = every(kernel=kernel, rank=np.int64(4), gate="hard", split=np.int32(1))
    snella.save(own, tmp_path / "a", base=tmp_path / "base")
    assert_same(snella.load(Every(nnx.Rngs(0)), tmp_path / "a"), own)


def test_training_goes_on_where_it_was(model, saved):
    loaded = snella.load(Every(nnx.Rngs(0)), saved)
    assert_same(trained(loaded, 2), trained(nnx.clone(model), 2))


def test_running_statistics_may_be_all_that_changed(tmp_path):
    model = every(trainable="")
    outputs(trained(model, 1))
    snella.save(model, tmp_path / "a")
    assert_same(snella.load(Every(nnx.Rngs(0)), tmp_path / "a"), model)


def test_a_model_that_is_adapted_alike_takes_the_file(model, saved):
    other = every()
    assert_same(snella.load(other, saved), model)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_frozen_weights_of_another_dtype(dtype, tmp_path):
    model = every(frozen_dtype=dtype)
    snella.save(model, tmp_path / "a")
    base = Every(nnx.Rngs(0))
    for path in ("conv", "qkv", "heads", "experts"):
        kernel = getattr(base, path).kernel
        kernel.set_value(kernel[...].astype(dtype))
    base.blocks.fc.kernel.set_value(base.blocks.fc.kernel[...].astype(dtype))
    loaded = snella.load(base, tmp_path / "a")
    for weight, other in zip(
        *(selection.weights_of(m) for m in (model, loaded)), strict=True
    ):
        np.testing.assert_array_equal(weight.delta(), other.delta())
        assert weight.w0.dtype == other.w0.dtype == dtype


def test_a_wider_base_is_known_by_its_rounding(caplog, tmp_path):
    snella.save(every(frozen_dtype=jnp.bfloat16), tmp_path / "a")
    snella.load(Every(nnx.Rngs(0)), tmp_path / "a")
    assert "is float32 and was bfloat16" in caplog.text
    with pytest.raises(snella.CheckpointError, match="fingerprint differs"):
        snella.load(Every(nnx.Rngs(5)), tmp_path / "a")


def test_what_the_files_say(model, saved):
    config = json.loads((saved / CONFIG).read_text("utf-8"))
    assert config["peft_type"] == "SNELLA"
    assert config["base_model_name_or_path"] == "our/base"
    assert config["snella_jax_version"] == snella.__version__
    assert config["modules_to_save"][:2] == ["head/bias", "head/kernel"]
    assert config["density"] == pytest.approx(0.4, abs=0.01)
    tensors = load_file(saved / TENSORS)
    assert tensors.keys() == config["tensors"].keys()
    own = "base_model.model.blocks.fc.snella_"
    assert tensors[own + "a"].shape == (3, 2, 8, 2)
    assert tensors["base_model.model.head.kernel"].shape == (8, 3)
    weights = {weight.path: weight for weight in selection.weights_of(model)}
    for path, said in config["weights"].items():
        weight = weights[path]
        np.testing.assert_array_equal(said["budgets"], weight.budget)
        for index in np.ndindex(weight.site.lead):
            factors = {k: v[index] for k, v in weight.factors.items()}
            dense = np.sort(np.abs(weight.site.kernel.apply(factors)), axis=None)[::-1]
            tau = np.asarray(said["thresholds"], np.float32)[index]
            assert tau == pytest.approx(dense[int(weight.budget[index])], rel=1e-5)


def wrong(model, folder, message, **options):
    before = leaves(model)
    with pytest.raises(snella.CheckpointError, match=message) as error:
        snella.load(model, folder, **options)
    assert str(folder) in str(error.value)
    after = leaves(model)
    for path, (_, value) in before.items():
        np.testing.assert_array_equal(after[path][1], value)


def test_another_base_is_refused(saved):
    base = Every(nnx.Rngs(0))
    kernel = np.array(base.blocks.fc.kernel[...])
    kernel[1, 2, 3] = np.nextafter(kernel[1, 2, 3], 2)
    base.blocks.fc.kernel[...] = jnp.asarray(kernel)
    wrong(
        base,
        saved,
        r"blocks/fc: the weight \(rows \[1\]\), float32, is not that of the base",
    )


def test_another_shape_rank_or_place_is_refused(model, saved):
    wrong(Every(nnx.Rngs(0), classes=4), saved, r"head/kernel: \[8, 3\] in the file")
    wrong(every(rank=6), saved, r"blocks/fc: rank is 4 in the file and 6 in the model")
    wrong(every(gate="hard"), saved, "gate is product in the file and hard in")
    wrong(every(targets=KINDS + "|head", trainable="norm"), saved, "head: the file has")
    wrong(
        vit.ViT(SMALL, rngs=nnx.Rngs(0)),
        saved,
        "conv: this model has no such layer(?s:.*)norm/mean: this model has no such",
    )
    names = {"qkv": "head"}
    wrong(
        Every(nnx.Rngs(0)), saved, "split=3 does not fit|the adapter is", rename=names
    )
    names = {"qkv": "conv"}
    wrong(Every(nnx.Rngs(0)), saved, "two weights are renamed to conv", rename=names)


def test_stacked_and_unrolled_models_read_the_same_file(tmp_path):
    base = vit.ViT(SMALL, rngs=nnx.Rngs(0))
    base.head.kernel[...] = jax.random.normal(jax.random.key(1), (8, 3))
    config = snella.SnellaConfig(rank=4, allocation="fixed", trainable="head|cls_token")
    model = snella.adapt(base, config, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
    snella.save(model, tmp_path / "stacked")
    unrolled = models.unstack(base)
    names = {r"blocks/(.*)\[(\d+)\]": r"blocks/\2/\1"}
    loaded = snella.load(unrolled, tmp_path / "stacked", rename=names)
    np.testing.assert_allclose(called(loaded, x), called(model, x), atol=1e-6)
    snella.save(loaded, tmp_path / "unrolled")
    names = {r"blocks/(\d+)/(.*)": r"blocks/\2[\1]"}
    again = snella.load(base, tmp_path / "unrolled", rename=names)
    assert_same(again, model)
    wrong(base, tmp_path / "unrolled", "blocks/0/attn/query: this model has no such")
    names = {r"blocks/(\d+)/(.*)": r"blocks/\2[7\1]"}
    wrong(base, tmp_path / "unrolled", r"the file has rows \[\(70,\)", rename=names)


def test_a_weight_trains_or_has_an_adapter():
    with pytest.raises(ValueError, match=r"matches adapted weights: \n  qkv/kernel"):
        every(trainable="qkv")


def test_a_model_that_trains_other_variables_is_refused(saved, tmp_path):
    wrong(every(trainable="norm"), saved, "other variables train: head/bias, head/k")


def test_a_base_in_half_precision_is_known_in_single(tmp_path):
    class Net(nnx.Module):
        def __init__(self, dtype, seed=0):
            self.fc = nnx.Linear(16, 24, rngs=nnx.Rngs(seed))
            self.fc.kernel.set_value(self.fc.kernel[...].astype(dtype))

    config = snella.SnellaConfig(rank=4, targets="fc", trainable="")
    dtypes = jnp.float32, jnp.float16, jnp.bfloat16
    for own, other in itertools.product(dtypes, repeat=2):
        snella.save(snella.adapt(Net(own), config, rngs=nnx.Rngs(1)), tmp_path / "a")
        half = {own, other} == {jnp.float16, jnp.bfloat16}
        with (
            pytest.raises(snella.CheckpointError, match="bfloat16")
            if half
            else contextlib.nullcontext()
        ):
            snella.load(Net(other), tmp_path / "a")
        wrong(Net(other, seed=5), tmp_path / "a", "fingerprint differs")


def test_what_cannot_be_saved_is_said(tmp_path):
    with pytest.raises(ValueError, match="has no adapters"):
        snella.save(Every(nnx.Rngs(0)), tmp_path / "a")

    class Mine(snella.kernels.rbf):
        pass

    model = every(overrides={"conv": {"kernel": Mine()}, "qkv": {"split": 3}})
    with pytest.raises(ValueError, match=r"no kernel of snella\.kernels"):
        snella.save(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_unloaded_the_base_speaks_again(model):
    base = Every(nnx.Rngs(0))
    adapted = snella.adapt(
        base, snella.SnellaConfig(rank=4, targets=KINDS, trainable=""), rngs=nnx.Rngs(1)
    )
    plain = snella.unload(adapted)
    assert_same(plain, base)
    np.testing.assert_array_equal(outputs(plain), outputs(base))
    assert type(plain.qkv) is nnx.Linear
    np.testing.assert_array_equal(
        snella.unload(model).head.kernel[...], model.head.kernel[...]
    )
    with pytest.raises(ValueError, match="has no adapters"):
        snella.unload(base)


DATA = ASSETS / "adapters"


def committed(name):
    """The base of an adapter that `tests/assets/adapters/make.py` made."""
    base = Every(nnx.Rngs(3))
    with np.load(DATA / name / "base.npz") as arrays:
        for path, variable in variables_of(base, nnx.Variable):
            variable.set_value(jnp.asarray(arrays[path]))
    return base


@pytest.mark.parametrize("name", ["format1", "format2"])
def test_adapters_of_earlier_versions_are_read(name):
    base, expected = committed(name), np.load(DATA / name / "expected.npz")
    for model in (
        snella.load(base, DATA / name / "adapter"),
        snella.apply_delta(base, DATA / name / "delta.safetensors"),
    ):
        model.eval()
        found = called(model, expected["images"])
        np.testing.assert_allclose(found, expected["outputs"], atol=1e-5)


def test_format_1_knows_the_adapted_weights_alone(caplog):
    base, folder = committed("format1"), DATA / "format1" / "adapter"
    base.norm.scale[...] += 1
    snella.load(base, folder)
    assert "is of format 1: whether the rest of the base" in caplog.text
    base.qkv.kernel[...] += 1
    wrong(base, folder, r"qkv(.|\n)*its SHA-256 differs")
    caplog.clear()
    snella.load(base, folder, allow_base_mismatch=True)
    assert "qkv: the weight, float32, is not that of the base" in caplog.text


@pytest.mark.parametrize(
    "path", ["norm/scale", "qkv/bias", "blocks/fc/bias", "conv/kernel"]
)
def test_format_2_knows_all_of_the_base(path):
    base, folder = committed("format2"), DATA / "format2" / "adapter"
    dict(variables_of(base, nnx.Param))[path][...] += 1
    wrong(base, folder, path.removesuffix("/kernel") + ": ")


def test_a_model_that_evaluates_still_does_with_other_adapters(tmp_path):
    config = snella.SnellaConfig(
        rank=4,
        targets="qkv",
        trainable="",
        allocation="fixed",
        path="parallel",
        dropout=0.5,
    )
    model = snella.adapt(Every(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    snella.save(model, tmp_path / "a")
    model.eval()
    assert snella.load(model, tmp_path / "a").qkv.adapter.deterministic
    model.train()
    assert not snella.load(model, tmp_path / "a").qkv.adapter.deterministic


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_model_writes_and_takes_the_same_file(kind, model, saved, tmp_path):
    """Weights by outputs, factors whole, on four fake devices."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))

    def place(path, leaf):
        halves = leaf.ndim and leaf.shape[-1] % 2 == 0 and "adapter" not in str(path)
        axes = [None] * (leaf.ndim - 1) + ["model"] if halves else []
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    def spread(model):
        graphdef, state = nnx.split(model)
        return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(place, state))

    other = spread(model)
    assert len(other.qkv.kernel[...].sharding.device_set) == 4
    snella.save(other, tmp_path / "sharded")
    one, two = (load_file(p / TENSORS) for p in (saved, tmp_path / "sharded"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(two[name], value)
    loaded = snella.load(spread(Every(nnx.Rngs(0))), saved)
    assert_same(loaded, model)
    assert len(loaded.qkv.kernel[...].sharding.device_set) == 4
