"""ONNX files: what their tensors are called, and which of them are read."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from snella_jax.files import onnx_file
from snella_jax.files.errors import CheckpointError

WEIGHT, BIAS, MATRIX = (
    np.arange(n, dtype=np.float32).reshape(shape)
    for n, shape in ((8, (2, 1, 2, 2)), (2, (2,)), (6, (2, 3)))
)
TABLE = np.arange(4, dtype=np.float32).reshape(2, 2)


def saved(path, nodes, weights):
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "main_graph", [], [], tensors)
    onnx.save(helper.make_model(graph), path)
    return path


def constant(path, array):
    value = numpy_helper.from_array(np.asarray(array))
    return helper.make_node("Constant", [], [f"{path}_output_0"], path, value=value)


def test_operands_of_one_node_are_told_apart(tmp_path):
    """A matrix keeps its node's name: its other operand is no weight."""
    nodes = [
        helper.make_node(
            "Conv", ["x", "onnx::Conv_7", "onnx::Conv_8"], ["y"], "/a/Conv"
        ),
        helper.make_node("Conv", ["y", "onnx::Conv_9", "a.bias"], ["z"], "/b.0/c/Conv"),
        helper.make_node(
            "MatMul", ["onnx::Mul_3", "onnx::MatMul_4"], ["w"], "/fc/MatMul"
        ),
    ]
    weights = {
        "onnx::Conv_7": WEIGHT,
        "onnx::Conv_8": BIAS,
        "onnx::Conv_9": 2 * WEIGHT,
        "a.bias": 2 * BIAS,
        "onnx::MatMul_4": MATRIX,
    }
    read = onnx_file.read(saved(tmp_path / "a.onnx", nodes, weights))
    expected = {
        "a.Conv.1": WEIGHT,
        "a.Conv.2": BIAS,
        "b.0.c.Conv": 2 * WEIGHT,
        "a.bias": 2 * BIAS,
        "fc.MatMul": MATRIX,
    }
    assert read.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(read[name], array)


def test_constants_are_read_where_they_are_asked_for(tmp_path):
    nodes = [
        constant("/a/Constant_5", TABLE),
        constant("/a/Constant", np.float32(0.5)),
        constant("/a/Constant_1", np.arange(4.0)),
        constant("/a/Constant_2", np.ones((2, 2), np.int64)),
        helper.make_node("Constant", [], ["z"], "/a/Constant_3", value_float=0.5),
        helper.make_node("Add", ["x", "a.bias"], ["y"], "/a/Add"),
    ]
    path = saved(tmp_path / "a.onnx", nodes, {"a.bias": BIAS})
    assert onnx_file.read(path).keys() == {"a.bias"}
    read = onnx_file.read(path, constants=True)
    assert read.keys() == {"a.bias", "a.Constant_5"}
    np.testing.assert_array_equal(read["a.Constant_5"], TABLE)


def test_names_that_two_tensors_would_have(tmp_path):
    twice = [
        helper.make_node("Conv", ["x", f"onnx::Conv_{i}"], ["y"], "/a/Conv")
        for i in (1, 2)
    ]
    weights = {"onnx::Conv_1": WEIGHT, "onnx::Conv_2": WEIGHT}
    path = saved(tmp_path / "a.onnx", twice, weights)
    with pytest.raises(
        CheckpointError, match=r"a\.onnx: two tensors are called a\.Conv\.1"
    ):
        onnx_file.read(path)
    path = saved(tmp_path / "b.onnx", [constant("/a/b", TABLE)], {"a.b": BIAS})
    with pytest.raises(CheckpointError, match=r"b\.onnx: two tensors are called a\.b"):
        onnx_file.read(path, constants=True)
