"""Damaged, missing and half written adapters: none is loaded, and none is lost."""

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from every_kind import Every, assert_same, every, leaves, trained
from flax import nnx
from places import ROOT
from safetensors.numpy import load_file, save_file

import snella_jax as snella
from snella_jax.adapters import file_format

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model():
    return trained(every())


@pytest.fixture
def saved(model, tmp_path):
    folder = tmp_path / "adapter"
    snella.save(model, folder, base="our/base")
    return folder


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
    metadata = {"format": "pt", "config_sha256": file_format._sha256(
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
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    change(config)
    content = json.dumps(config).encode()
    (folder / CONFIG).write_bytes(content)
    tensors = load_file(folder / TENSORS)
    digest = file_format._sha256(content)
    metadata = {"format": "pt", "config_sha256": digest}
    save_file(tensors, folder / TENSORS, metadata)


def rest(config):
    """Returns the entry of one weight without an adapter."""
    return config["rest_of_base"]["weights"]["norm/scale"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(peft_type="LORA"), "peft_type is 'LORA'"),
        (lambda c: c.update(snella_format=3), "snella_format is 3"),
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
        (lambda c: c["weights"]["conv"].pop("base_places"), "damaged"),
        (lambda c: c["weights"]["conv"]["base_places"][0].clear(), "damaged"),
        (lambda c: c["weights"]["conv"].update(base_dtype="x"), "damaged"),
        (lambda c: c.pop("rest_of_base"), "damaged"),
        (lambda c: c["rest_of_base"].pop("configs"), "damaged"),
        (lambda c: rest(c).pop("numbers"), "damaged"),
        (lambda c: rest(c).update(shape=["x"]), "damaged"),
        (lambda c: rest(c).update(dtype="x"), "damaged"),
        (lambda c: rest(c)["places"].update(float32="no number"), "damaged"),
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

    monkeypatch.setattr(file_format, "write_tensors", full)
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
        from snella_jax.files.atomic import whole_folder
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
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
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


def test_a_folder_of_something_else_is_left_alone(model, tmp_path):
    (tmp_path / "notes.md").write_text("mine", "utf-8")
    with pytest.raises(FileExistsError, match=r"notes\.md"):
        snella.save(model, tmp_path)
    with pytest.raises(FileExistsError, match="is no folder"):
        snella.save(model, tmp_path / "notes.md")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]


def test_what_a_link_points_at_is_written_and_read(model, tmp_path):
    disk, other = tmp_path / "disk", tmp_path / "other" / "pets"
    disk.mkdir()
    for target in (disk, other):  # one is there, one is made
        (tmp_path / "pets").symlink_to(target)
        for _ in range(2):  # new, and replaced
            snella.save(model, tmp_path / "pets")
        assert (tmp_path / "pets").is_symlink()
        assert {path.name for path in target.iterdir()} == {CONFIG, TENSORS}
        assert_same(snella.load(Every(nnx.Rngs(0)), tmp_path / "pets"), model)
        (tmp_path / "pets").unlink()
    file = tmp_path / "disk" / "there.safetensors"
    (tmp_path / "delta.safetensors").symlink_to(file)
    snella.save_delta(tmp_path / "delta.safetensors", {}, {"w": np.zeros(2)})
    assert file.is_file() and (tmp_path / "delta.safetensors").is_symlink()


@pytest.mark.parametrize("name", [".", "", "../here"])
def test_the_current_folder_is_refused_in_words(name, model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileExistsError, match="here is the current folder: a new") as e:
        snella.save(model, name)
    assert e.value.errno is None and not list((tmp_path / "here").iterdir())
    snella.save(model, "made")
    assert_same(snella.load(Every(nnx.Rngs(0)), "made"), model)


def test_where_a_disk_is_mounted_is_refused_in_words(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    with pytest.raises(FileExistsError, match="disk is where a disk is mounted"):
        snella.save(model, tmp_path / "disk")
    snella.save(model, tmp_path / "disk" / "pets")


def test_names_may_be_as_long_as_the_file_system_takes_them(model, tmp_path):
    name = "ä" * 120 + "x" * 10  # 250 bytes
    snella.save(model, tmp_path / name)
    assert_same(snella.load(Every(nnx.Rngs(0)), tmp_path / name), model)
    path = tmp_path / f"{name[:-12]}.safetensors"
    snella.save_delta(path, {"w": np.zeros(2)}, {"w": np.ones(2)})
    assert snella.apply_delta({"w": np.zeros(2)}, path)["w"].tolist() == [1, 1]
