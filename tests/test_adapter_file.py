"""Adapters as files: exact round trips, and no damage that goes unnoticed."""

import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_kind import KINDS, Every, assert_same, every, leaves, outputs, trained
from flax import nnx
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

import snella_jax as snella
from snella_jax import models
from snella_jax.models import vit

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
        *(snella.rules.weights_of(m) for m in (model, loaded)), strict=True
    ):
        np.testing.assert_array_equal(weight.delta(), other.delta())
        assert weight.w0.dtype == other.w0.dtype == dtype


def test_a_wider_base_is_known_by_its_rounding(caplog, tmp_path):
    snella.save(every(frozen_dtype=jnp.bfloat16), tmp_path / "a")
    snella.load(Every(nnx.Rngs(0)), tmp_path / "a")
    assert "is float32 and was bfloat16" in caplog.text
    with pytest.raises(snella.CheckpointError, match="SHA-256 differs"):
        snella.load(Every(nnx.Rngs(5)), tmp_path / "a")


def test_what_the_files_say(model, saved):
    config = json.loads((saved / CONFIG).read_text())
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
    weights = {weight.path: weight for weight in snella.rules.weights_of(model)}
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
    np.testing.assert_allclose(loaded(x), model(x), atol=1e-6)
    snella.save(loaded, tmp_path / "unrolled")
    names = {r"blocks/(\d+)/(.*)": r"blocks/\2[\1]"}
    again = snella.load(base, tmp_path / "unrolled", rename=names)
    assert_same(again, model)
    wrong(base, tmp_path / "unrolled", "blocks/0/attn/query: this model has no such")
    names = {r"blocks/(\d+)/(.*)": r"blocks/\2[7\1]"}
    wrong(base, tmp_path / "unrolled", r"the file has rows \[\(70,\)", rename=names)


def damaged(folder, other, rng):
    """Some 240 ways to damage an adapter: a name, and what does it to a copy."""
    for name in (CONFIG, TENSORS):
        content = (folder / name).read_bytes()
        for cut in sorted(rng.sample(range(len(content)), 25)):
            yield f"{name} cut at {cut}", name, content[:cut]
        for place in sorted(rng.sample(range(len(content)), 50)):
            bit = rng.randrange(8)
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            yield f"{name} bit {bit} of byte {place}", name, bytes(flipped)
        head = rng.sample(range(300), 25)
        for place in head:
            flipped = bytearray(content)
            flipped[place] ^= 1 << rng.randrange(8)
            yield f"{name} a bit of byte {place}", name, bytes(flipped)
        for place in rng.sample(range(len(content)), 10):
            yield (
                f"{name} without byte {place}",
                name,
                (content[:place] + content[place + 1 :]),
            )
        for place in rng.sample(range(len(content)), 10):
            yield (
                f"{name} with more at {place}",
                name,
                (content[:place] + rng.randbytes(3) + content[place:]),
            )
        yield f"{name} of another adapter", name, (other / name).read_bytes()
        yield f"{name} empty", name, b""
    tensors = load_file(folder / TENSORS)
    metadata = {"format": "pt", "config_sha256": snella.adapter_file._sha256(
        (folder / CONFIG).read_bytes())}  # fmt: skip
    same = [k for k in tensors if k.endswith("snella_alpha") and tensors[k].shape == ()]
    swapped = tensors | {same[0]: tensors[same[1]] + 1, same[1]: tensors[same[0]]}
    for label, changed in (
        ("two tensors swapped", swapped),
        ("a tensor less", dict(list(tensors.items())[1:])),
        ("a tensor more", tensors | {"more": np.zeros(2)}),
        ("a tensor of another dtype", tensors | {same[0]: np.float64(1)}),
    ):
        path = folder.parent / "changed.safetensors"
        save_file({k: np.asarray(v) for k, v in changed.items()}, path, metadata)
        yield label, TENSORS, path.read_bytes()


def test_no_damage_goes_unnoticed(model, saved, tmp_path):
    other = trained(nnx.clone(model), 1)
    snella.save(other, tmp_path / "other")
    base = Every(nnx.Rngs(0))
    before = leaves(base)
    broken = tmp_path / "broken"
    cases = unnoticed = 0
    for label, name, content in damaged(saved, tmp_path / "other", random.Random(0)):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(saved, broken)
        (broken / name).write_bytes(content)
        assert content != (saved / name).read_bytes()
        cases += 1
        try:
            snella.load(base, broken)
        except snella.CheckpointError as error:
            assert str(broken) in str(error), label
        else:
            unnoticed += 1
            print("unnoticed:", label)
    assert cases >= 240 and not unnoticed
    after = leaves(base)
    assert all(np.array_equal(before[p][1], after[p][1]) for p in before)
    snella.load(base, saved)  # and whole it loads


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        snella.load(Every(nnx.Rngs(0)), saved)


def consistent(folder, change):
    """Changes the config and signs it anew, as another program would write it."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    content = json.dumps(config).encode()
    (folder / CONFIG).write_bytes(content)
    tensors = load_file(folder / TENSORS)
    digest = snella.adapter_file._sha256(content)
    metadata = {"format": "pt", "config_sha256": digest}
    save_file(tensors, folder / TENSORS, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(peft_type="LORA"), "peft_type is 'LORA'"),
        (lambda c: c.update(snella_format=2), "snella_format is 2"),
        (lambda c: c.pop("weights"), "damaged"),
        (lambda c: c["weights"]["conv"].pop("stack"), "damaged"),
        (
            lambda c: c["weights"]["conv"]["rule"].update(rank=3),
            "not those of its rule",
        ),
        (lambda c: c["weights"]["conv"]["rule"].update(gate="hrad"), "No gate"),
        (lambda c: c["weights"]["conv"]["rule"]["kernel"].update(name="x"), "damaged"),
        (lambda c: c["weights"]["conv"].update(budgets=[1, 2]), "damaged"),
        (lambda c: c.update(tensors=[]), "damaged"),
    ],
)
def test_what_another_program_wrote_is_checked(saved, change, message):
    consistent(saved, change)
    with pytest.raises(snella.CheckpointError, match=message):
        snella.load(Every(nnx.Rngs(0)), saved)


def test_saving_again_replaces_and_an_error_leaves_the_old(model, saved, monkeypatch):
    other = trained(nnx.clone(model), 1)
    snella.save(other, saved)
    assert_same(snella.load(Every(nnx.Rngs(0)), saved), other)

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(snella.adapter_file, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        snella.save(model, saved)
    assert_same(snella.load(Every(nnx.Rngs(0)), saved), other)
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]
    with pytest.raises(OSError, match="no space"):
        snella.save(model, saved.parent / "new")
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("renames", [0, 1])
def test_a_killed_save_loses_nothing(model, saved, renames):
    """Killed at the first rename the old one is there; at the second, both beside."""
    script = f"""
        import os, sys
        from pathlib import Path
        from snella_jax.models.atomic import whole_folder
        calls, real = [], os.replace
        def replace(*paths):
            calls.append(paths)
            if len(calls) > {renames}:
                os._exit(9)
            real(*paths)
        os.replace = replace
        folder = Path(sys.argv[1])
        with whole_folder(folder) as new:
            for path in folder.iterdir():
                (new / path.name).write_bytes(path.read_bytes())
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), saved], env=environment
    )
    assert done.returncode == 9
    if renames == 0:
        assert_same(snella.load(Every(nnx.Rngs(0)), saved), model)
        return
    with pytest.raises(FileNotFoundError, match="cut off left") as error:
        snella.load(Every(nnx.Rngs(0)), saved)
    for name in ("old", "new"):
        (kept,) = saved.parent.glob(f".adapter.*/{name}")
        assert str(kept) in str(error.value)
        assert_same(snella.load(Every(nnx.Rngs(0)), kept), model)


@pytest.mark.parametrize("renames", [1, 2])
def test_a_signal_between_the_renames_loses_nothing(model, saved, renames, monkeypatch):
    """Python delivers it when `os.replace` is done."""
    calls, real = [], os.replace

    def replace(*paths):
        real(*paths)
        calls.append(paths)
        if len(calls) == renames:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    other = trained(nnx.clone(model), 1)
    with pytest.raises(KeyboardInterrupt):
        snella.save(other, saved)
    monkeypatch.undo()
    assert_same(snella.load(Every(nnx.Rngs(0)), saved), other if renames > 1 else model)
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


def test_what_is_left_of_another_adapter_is_not_offered(tmp_path):
    for name, files in ((".pets.v2.abcdefgh/old", 2), (".pets.abcdefgh/new", 1)):
        (tmp_path / name).mkdir(parents=True)
        for file in (CONFIG, TENSORS)[:files]:
            (tmp_path / name / file).touch()
    with pytest.raises(FileNotFoundError) as error:
        snella.load(Every(nnx.Rngs(0)), tmp_path / "pets")
    assert "cut off" not in str(error.value)
    (tmp_path / ".pets.abcdefgh/new" / TENSORS).touch()
    with pytest.raises(FileNotFoundError, match=r"pets\.abcdefgh/new: move it"):
        snella.load(Every(nnx.Rngs(0)), tmp_path / "pets")


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
        wrong(Net(other, seed=5), tmp_path / "a", "SHA-256 differs")


def test_a_folder_of_something_else_is_left_alone(model, tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.md"):
        snella.save(model, tmp_path)
    with pytest.raises(FileExistsError, match="is no folder"):
        snella.save(model, tmp_path / "notes.md")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]


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


def test_adapters_of_earlier_versions_are_read():
    """Format 1, written by version 0.1.0: `tests/data/adapters/make.py`."""
    data = Path(__file__).parent / "data" / "adapters" / "format1"
    base = Every(nnx.Rngs(3))
    arrays = np.load(data / "base.npz")
    for path, variable in snella.rules.variables_of(base, nnx.Variable):
        variable.set_value(jnp.asarray(arrays[path]))
    expected = np.load(data / "expected.npz")
    model = snella.load(base, data / "adapter")
    model.eval()
    found = model(expected["images"])
    np.testing.assert_allclose(found, expected["outputs"], atol=1e-5)
    merged = snella.apply_delta(base, data / "delta.safetensors")
    merged.eval()
    found = merged(expected["images"])
    np.testing.assert_allclose(found, expected["outputs"], atol=1e-5)


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
