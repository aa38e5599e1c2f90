"""The weights of an ONNX file that PyTorch exported, under PyTorch's names.

The exporter folds transpositions and slices into new arrays and calls these
`onnx::MatMul_1966`; the node that uses one still carries its module's path.
"""

from pathlib import Path

import numpy as np

from snella_jax.files.errors import CheckpointError


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads the initialisers by name; a folded one is called after its node's path.

    The second operand of `/encoder/layer.0/mlp/fc1/MatMul` becomes
    `encoder.layer.0.mlp.fc1.MatMul`, and is `[in, out]`.

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
    try:
        graph = onnx.load(path, load_external_data=False).graph
        users = {name: node.name for node in graph.node for name in node.input}
        tensors: dict[str, np.ndarray] = {}
        for tensor in graph.initializer:
            name = tensor.name
            if name.startswith("onnx::"):
                if name not in users:
                    raise CheckpointError(path, f"it has {name}, which no node uses")
                name = users[name].removeprefix("/").replace("/", ".")
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
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
