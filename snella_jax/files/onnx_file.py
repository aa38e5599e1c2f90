"""The weights of an ONNX file that PyTorch exported, under PyTorch's names.

The exporter folds transpositions, slices and batch norms into new arrays and calls
these `onnx::MatMul_1966`; the node that uses one still carries its module's path. What
does not depend on the input, such as an indexed table, becomes a node `Constant`.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from snella_jax.files.errors import CheckpointError

FOLDED = "onnx::"  # beginning of the names of folded arrays


def read(path: Path, *, constants: bool = False) -> dict[str, np.ndarray]:
    """Reads the initialisers by name; a folded one is called after its node's path.

    The second operand of `/encoder/layer.0/mlp/fc1/MatMul` becomes
    `encoder.layer.0.mlp.fc1.MatMul`, and is `[in, out]`. Where several operands of a
    node are folded, a number says which, from 0: weight and bias of `/stem/Conv` are
    `stem.Conv.1` and `stem.Conv.2`.

    Args:
      path: the file.
      constants: True to read the floating-point numbers of nodes `Constant`, too, if
        they have two axes or more, by the node's path: `layers.1.attn.Constant_5`.

    Raises:
      CheckpointError: the file is damaged, keeps tensors in other files, or has two
        tensors of one name.
      ModuleNotFoundError: onnx is not installed.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'Reading {path} needs onnx: pip install "snella-jax[demo]"'
        ) from error
    kind = onnx.TensorProto
    floats = (kind.FLOAT, kind.FLOAT16, kind.BFLOAT16, kind.DOUBLE)
    try:
        graph = onnx.load(path, load_external_data=False).graph
        named = _initialisers(graph)
        if constants:
            named += [(n, t) for n, t in _constants(graph) if t.data_type in floats]
        tensors: dict[str, np.ndarray] = {}
        for name, tensor in named:
            if name.startswith(FOLDED):
                raise CheckpointError(path, f"it has {name}, which no node uses")
            if tensor.data_location == kind.EXTERNAL:
                raise CheckpointError(
                    path, f"{name} is in another file: save them as one"
                )
            if name in tensors:
                raise CheckpointError(path, f"two tensors are called {name}")
            tensors[name] = onnx.numpy_helper.to_array(tensor)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError.damaged(path, error) from error
    if not tensors:
        raise CheckpointError(path, "no tensors: it is cut short, or no ONNX file")
    return tensors


def _initialisers(graph: Any) -> list[tuple[str, Any]]:
    """Lists the initialisers, the folded ones named after the node that uses them."""
    names = {tensor.name: tensor.name for tensor in graph.initializer}
    users = {
        name: (_dotted(node.name), operand)
        for node in graph.node
        for operand, name in enumerate(node.input)
        if name in names and name.startswith(FOLDED)
    }
    counts = Counter(node for node, _ in users.values())
    for name, (node, operand) in users.items():
        names[name] = node if counts[node] == 1 else f"{node}.{operand}"
    return [(names[tensor.name], tensor) for tensor in graph.initializer]


def _constants(graph: Any) -> list[tuple[str, Any]]:
    """Lists the arrays of nodes `Constant` with two axes or more, and their names."""
    return [
        (_dotted(node.name), attribute.t)
        for node in graph.node
        for attribute in node.attribute
        if node.op_type == "Constant" and len(attribute.t.dims) > 1
    ]


def _dotted(node: str) -> str:
    return node.removeprefix("/").replace("/", ".")
