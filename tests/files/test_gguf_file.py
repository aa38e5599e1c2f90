"""GGUF files against blocks taken apart number by number, and damaged ones."""

import struct
import sys

import gguf
import ml_dtypes
import numpy as np
import pytest

from snella_jax.files import gguf_file
from snella_jax.files.errors import CheckpointError

KINDS = ["F32", "F16", "BF16", "F64", "Q8_0", "Q4_0", "Q4_1"]
METADATA = {
    "general.name": "tiny ü",
    "llama.block_count": 2,
    "llama.rope.freq_base": 0.5,
    "llama.shift": -3,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.tokens": ["a", "", "Ġ b"],
    "tokenizer.ggml.scores": [-0.5, 2.0],
    "tokenizer.ggml.token_type": [1, 3, 6],
}


def numbers(rows=3, columns=64):
    return np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)


def written(path, tensors, alignment=32, **metadata):
    """Writes a file; tensors are float arrays, or pairs of an array and its kind."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    writer.add_string("general.name", METADATA["general.name"])
    writer.add_uint32("llama.block_count", METADATA["llama.block_count"])
    writer.add_float32("llama.rope.freq_base", METADATA["llama.rope.freq_base"])
    writer.add_int64("llama.shift", METADATA["llama.shift"])
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    for key in ("tokens", "scores", "token_type"):
        writer.add_array(f"tokenizer.ggml.{key}", METADATA[f"tokenizer.ggml.{key}"])
    for key, value in metadata.items():
        writer.add_uint32(key, value)
    for name, (array, kind) in tensors.items():
        number = gguf.GGMLQuantizationType[kind]
        if kind == "F64":
            data = array.astype(np.float64)
        else:
            data = gguf.quants.quantize(array, number)
        writer.add_tensor(name, data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny(path):
    return written(path, {kind.lower(): (numbers(), kind) for kind in KINDS})


def unpacked(kind, row):
    """Returns the weights of a row's bytes, one after the other."""
    size, found = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind], []
    for at in range(0, len(row), size):
        block = row[at : at + size]
        (scale,) = struct.unpack_from("<e", block)
        if kind == "Q8_0":
            found += [scale * q for q in struct.unpack_from("<32b", block, 2)]
            continue
        start, least = 0.0, 2
        if kind == "Q4_1":
            (start,), least = struct.unpack_from("<e", block, 2), 4
        else:
            start = -8 * scale
        found += [scale * (byte & 15) + start for byte in block[least:]]
        found += [scale * (byte >> 4) + start for byte in block[least:]]
    return found


def test_metadata_and_floats_come_back(tmp_path):
    file = gguf_file.open(tiny(tmp_path / "tiny.gguf"))
    assert {key: file.metadata[key] for key in METADATA} == METADATA
    assert list(file.tensors) == [kind.lower() for kind in KINDS]
    dtypes = {
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F64": np.float64,
    }
    for kind, dtype in dtypes.items():
        tensor = file.tensors[kind.lower()]
        assert (tensor.shape, tensor.kind, tensor.dtype) == ((3, 64), kind, dtype)
        np.testing.assert_array_equal(tensor.read(), numbers().astype(dtype))
        half = tensor.read(np.float16)
        np.testing.assert_array_equal(half, numbers().astype(dtype).astype(np.float16))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_are_dequantised(kind, tmp_path, monkeypatch):
    """Also a row at a time, and into bfloat16."""
    path = tiny(tmp_path / "tiny.gguf")
    tensor = gguf_file.open(path).tensors[kind.lower()]
    expected = np.asarray([unpacked(kind, bytes(row)) for row in tensor.data])
    found = tensor.read()
    assert found.dtype == tensor.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert np.abs(found - numbers()).max() < 0.3  # these are the weights at all
    monkeypatch.setattr(gguf_file, "AT_ONCE", 64)
    np.testing.assert_array_equal(tensor.read(), found)
    np.testing.assert_array_equal(
        tensor.read(ml_dtypes.bfloat16), found.astype(ml_dtypes.bfloat16)
    )


def test_shapes_and_alignment(tmp_path):
    """NumPy's order, one axis to three, another alignment."""
    shapes = {"one": (5,), "two": (2, 7), "three": (2, 3, 32)}
    arrays = {name: numbers(1, 192).ravel()[: np.prod(s)] for name, s in shapes.items()}
    kinds = {"one": "F32", "two": "F16", "three": "Q8_0"}
    tensors = {n: (arrays[n].reshape(shapes[n]), kinds[n]) for n in shapes}
    file = gguf_file.open(written(tmp_path / "a.gguf", tensors, alignment=128))
    assert {name: t.shape for name, t in file.tensors.items()} == shapes
    np.testing.assert_array_equal(file.tensors["one"].read(), arrays["one"])
    np.testing.assert_allclose(
        file.tensors["three"].read(), tensors["three"][0], atol=0.02
    )


def test_nothing_is_copied_where_nothing_is_converted(tmp_path):
    tensor = gguf_file.open(tiny(tmp_path / "tiny.gguf")).tensors["f32"]
    assert np.shares_memory(tensor.read(), tensor.data)
    assert not tensor.read().flags.writeable


def test_every_cut_is_named(tmp_path):
    """The file ends anywhere, in the header or in the data."""
    whole = tiny(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    cuts = [*range(0, len(whole) - 32, 61), len(whole) // 2]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(
            CheckpointError, match=r"cut\.gguf: (cut|the file is empty)"
        ):
            gguf_file.open(path)


def header(*parts, tensors=0, values=0, magic=b"GGUF", version=3):
    return magic + struct.pack("<IQQ", version, tensors, values) + b"".join(parts)


def text(value):
    return struct.pack("<Q", len(value)) + value


def info(name=b"w", shape=(32,), kind=0, offset=0):
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


ROOM = bytes(4096)
DAMAGED = {
    "other magic": (header(magic=b"GGML"), r"no GGUF file: it begins with b'GGML'"),
    "old version": (header(version=1), "version 1 of GGUF, expected 2 or 3"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "many values": (header(text(b"a"), values=2**60), "cut short or damaged"),
    "many tensors": (header(info(), tensors=2**60), "cut short or damaged"),
    "long name": (
        header(struct.pack("<Q", 2**63), values=1),
        "takes 9223372036854775808",
    ),
    "no text": (header(text(b"\xff"), values=1), "no UTF-8"),
    "type of value": (
        header(text(b"a"), struct.pack("<I", 13), values=1),
        "value 'a' is of unknown type 13",
    ),
    "type in list": (
        header(text(b"a"), struct.pack("<IIQ", 9, 9, 1), values=1),
        "value 'a' is a list of unknown type 9",
    ),
    "long list": (
        header(text(b"a"), struct.pack("<IIQ", 9, 0, 2**60), ROOM, values=1),
        "value 'a' takes 1152921504606846976 bytes",
    ),
    "many texts": (
        header(text(b"a"), struct.pack("<IIQ", 9, 8, 2**60), ROOM, values=1),
        "value 'a' takes 9223372036854775808 bytes",
    ),
    "two values": (
        header(2 * (text(b"a") + struct.pack("<IB", 0, 1)), values=2),
        "two values are called 'a'",
    ),
    "two tensors": (header(2 * info(), tensors=2), "two tensors are called 'w'"),
    "axes": (header(info(shape=(1,) * 5), tensors=1), "5 axes, expected 1 to 4"),
    "no rows": (header(info(shape=(32, 0)), ROOM, tensors=1), r"is \(0, 32\)"),
    "overflow": (
        header(info(shape=(2**33, 2**33)), ROOM, tensors=1),
        "ends at byte 295147905179352825856 of the data",
    ),
    "unknown type": (header(info(kind=99), ROOM, tensors=1), "'w' is of type 99"),
    "type of no weights": (
        header(info(kind=9), ROOM, tensors=1),
        "type Q8_1, which the package gguf cannot dequantise",
    ),
    "half a block": (
        header(info(shape=(33,), kind=8), ROOM, tensors=1),
        "33 columns, expected a multiple of Q8_0's 32",
    ),
    "far away": (header(info(offset=2**40), ROOM, tensors=1), "ends at byte 10995"),
    "not aligned": (header(info(offset=8), ROOM, tensors=1), "multiple of 32"),
    "overlap": (
        header(info(), info(b"v", offset=96), ROOM, tensors=2),
        "tensor 'v' begins at 96, expected a multiple of 32 after 'w', which ends at 1",
    ),
    "alignment": (
        header(text(b"general.alignment"), struct.pack("<II", 4, 24), values=1),
        "general.alignment is 24",
    ),
    "part": (
        header(text(b"split.count"), struct.pack("<IH", 2, 3), values=1),
        "one of 3 parts of a model",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case, tmp_path):
    data, message = DAMAGED[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"bad\.gguf: .*{message}"):
        gguf_file.open(path)


def test_without_gguf_floats_are_read(tmp_path, monkeypatch):
    """Blocks need the package, and the error names the extra."""
    plain = written(tmp_path / "plain.gguf", {"w": (numbers(), "F16")})
    blocks = tiny(tmp_path / "blocks.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    gguf_file.open(plain).tensors["w"].read()
    with pytest.raises(ModuleNotFoundError, match=r"blocks\.gguf .*snella-jax\[lang"):
        gguf_file.open(blocks)
