"""Mapped `.safetensors` files hold what the library wrote, of every dtype."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from snella_jax.files.errors import CheckpointError
from snella_jax.files.readers import DTYPES, map_safetensors
from snella_jax.files.tensors import write_tensors

DRAW = np.random.default_rng(0)


def test_every_dtype_is_what_was_written(tmp_path):
    numbers = DRAW.integers(0, 2, (3, 5))
    tensors = {kind: numbers.astype(dtype) for kind, dtype in DTYPES.items()}
    tensors |= {"scalar": np.float32(3), "empty": np.zeros((0, 4), np.float32)}
    tensors = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"format": "pt"})
    got, metadata = map_safetensors(path)
    assert metadata == {"format": "pt"}
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype
        np.testing.assert_array_equal(got[name], tensor)
        assert not got[name].flags.writeable


def test_a_dtype_that_numpy_does_not_know(tmp_path):
    entry = {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}
    header = json.dumps({"scales": entry}).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: scales is of dtype F8"):
        map_safetensors(path)


def test_files_are_the_same_bytes_whatever_the_order_of_metadata(tmp_path):
    """And read as safetensors' own: names and texts of any letters."""
    tensors = {"weight/é": np.arange(6.0).reshape(2, 3), "b": np.ones(3, np.int8)}
    metadata = {f"key {i}": f'"quoted" \\ \n\t\x01 ü {i}' for i in range(9)}
    back = dict(reversed(metadata.items()))
    for name, own in (("one", metadata), ("other", back)):
        write_tensors(tensors, tmp_path / name, own)
    found = [(tmp_path / name).read_bytes() for name in ("one", "other")]
    assert found[0] == found[1]
    with safe_open(tmp_path / "one", "np") as file:
        assert file.metadata() == metadata
        for name, value in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name), value)
