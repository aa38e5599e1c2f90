"""PyTorch's files without PyTorch: nothing is executed, nothing reaches too far."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import script_archive
from places import ASSETS

from snella_jax.files import torch_file
from snella_jax.files.errors import CheckpointError
from snella_jax.models import vit

DATA = ASSETS / "vit"
# A width of 12 does not say how many heads there are.
HEADS = {"heads": 2}


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def torch_archive(path, saved):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(saved, protocol=2))
    return path


def test_nothing_in_a_file_is_executed(tmp_path):
    """Neither beside the weights nor deep inside an optimizer's state."""
    for saved in (
        Touch(tmp_path / "made"),
        {"optimizer": [{"x": Touch(tmp_path / "a")}]},
    ):
        path = torch_archive(tmp_path / "evil.pth", saved)
        with pytest.raises(CheckpointError, match=r"evil\.pth: it names \w+\.mkdir"):
            vit.load(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pth"]


def zipped(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", np.ones(4, np.float32).tobytes())
    return path


def test_a_file_cannot_change_what_it_names(tmp_path):
    """The pickle sets `__defaults__` of the function that makes tensors."""
    before = torch_file._tensor.__defaults__
    pickled = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    pickled += b"N}X\x0c\x00\x00\x00__defaults__K\x07\x85s\x86b."
    function = torch_file.read(zipped(tmp_path / "sets.pth", pickled))
    assert function.__defaults__ == (7,)  # the file did what it could
    assert torch_file._tensor.__defaults__ is before


@pytest.mark.parametrize(
    "size, stride, offset",
    [
        ((5,), (1,), 0),
        ((2, 2), (3, 1), 0),
        ((4,), (1,), 1),
        ((2,), (-1,), 1),
        ((2**40,), (0,), 0),
        ((2, 2), (1,), 0),
    ],
)
def test_a_tensor_stays_in_its_storage(size, stride, offset):
    with pytest.raises(ValueError, match="a tensor of size"):
        storage = torch_file._Storage(np.ones(4, np.float32))
        torch_file._tensor(storage, offset, size, stride)


def test_a_tensor_is_no_storage():
    """A view that repeats one number would promise more than there is behind it."""
    storage = torch_file._Storage(np.ones(64, np.float32))
    repeated = torch_file._tensor(storage, 63, (64,), (0,))
    with pytest.raises(ValueError, match="something else than a storage"):
        torch_file._tensor(repeated, 0, (64,), (1,))


def test_tensors_of_one_storage_share_it(tmp_path):
    pid = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    pid += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    view = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"K%c(K\x02t(K\x01tt R"
    views = b"\x80\x02(" + b"".join(view.replace(b" ", b"") % i for i in (0, 1)) + b"t."
    first, second = torch_file.read(zipped(tmp_path / "two.pth", views))
    assert np.shares_memory(first, second)


def test_places_in_the_memo_have_no_gaps(tmp_path):
    """The unpickler would allocate 16 bytes for each place below the highest."""
    pickled = b"\x80\x02}r\x00\x00\x00\x04."
    with pytest.raises(CheckpointError, match="notes something at place 67108864"):
        torch_file.read(zipped(tmp_path / "memo.pth", pickled))


def test_a_file_cannot_change_a_storage_or_hang_methods_on_a_dict(tmp_path):
    kind = b"\x80\x02ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeK\x01sb."
    with pytest.raises(CheckpointError, match="it sets the state of a storage"):
        torch_file.read(zipped(tmp_path / "kind.pth", kind))
    hung = b"\x80\x02ccollections\nOrderedDict\n)R}X\x03\x00\x00\x00getK\x01sb."
    assert torch_file.read(zipped(tmp_path / "hung.pth", hung)).get("x") is None


def remade_archive(tmp_path, change):
    """`mae.pth` with members changed: `change` gives bytes and kind of compression."""
    source, path = zipfile.ZipFile(DATA / "mae.pth"), tmp_path / "remade.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for member in source.namelist():
            data, compression = change(member, source.read(member))
            archive.writestr(member, data, compression)
    return path


def test_storages_are_little_endian_and_uncompressed(tmp_path):
    stored, deflated = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED

    def big_endian(member, data):
        return (b"big" if member.endswith("byteorder") else data), stored

    def compressed(member, data):
        return data, deflated if "/data/" in member else stored

    for change, message in (
        (big_endian, "little-endian"),
        (compressed, "storage .* is compressed"),
    ):
        with pytest.raises(CheckpointError, match=message):
            vit.load(remade_archive(tmp_path, change), **HEADS)


def test_numbers_strings_and_containers_pass():
    saved = torch_file.read(DATA / "moco.pth.tar")
    assert (saved["epoch"], saved["arch"], saved["best"]) == (300, "vit_base", 1.0)
    assert saved["optimizer"]["param_groups"][0]["lr"] == 0.1


def test_a_file_without_tensors_or_of_the_old_format(tmp_path):
    path = torch_archive(tmp_path / "no.pth", {"model": {"x": 1}})
    with pytest.raises(CheckpointError, match="expected tensors by name"):
        vit.load(path)
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(CheckpointError, match=r"before PyTorch 1\.6"):
        vit.load(tmp_path / "old.pth")


def test_a_storage_that_is_too_short(tmp_path):
    """A tensor may not reach beyond its storage, whatever the pickle says."""
    source, path = zipfile.ZipFile(DATA / "mae.pth"), tmp_path / "short.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for member in source.namelist():
            data = source.read(member)
            archive.writestr(member, data[:-4] if member.endswith("data/0") else data)
    with pytest.raises(CheckpointError, match=r"short\.pth: damaged .*does not hold"):
        vit.load(path)


def test_a_module_of_torchscript_gives_its_tensors(tmp_path):
    tensors = {
        "weight": np.arange(6, dtype=np.float16).reshape(2, 3),
        "inner.0.bias": np.arange(2, dtype=np.float32),
        "inner.scale": np.array(3.5, np.float32),
        "size": np.array(224),
    }
    path = script_archive.write(tmp_path / "clip.pt", tensors, name="a", none=None)
    found = torch_file.read(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)


@pytest.mark.parametrize(
    "pickled",
    [
        b"c__torch__\nM\n)\x81K\x01b.",  # its state is a number
        b"c__torch__\nM\n}b.",  # the state of its class
        b"c__torch__\nM\n)\x81q\x01}X\x01\x00\x00\x00ah\x01sb.",  # it is inside itself
        b"c__torch__\nM\n)\x81.",  # it has no state
    ],
)
def test_a_module_of_torchscript_that_cannot_be(pickled, tmp_path):
    with pytest.raises(CheckpointError, match=r"odd\.pt: damaged"):
        torch_file.read(zipped(tmp_path / "odd.pt", b"\x80\x02" + pickled))
