"""Prefixes of the names in a checkpoint, and files with several sets of weights.

Wrappers (`module.`), larger models (`backbone.`) and averages (`model_ema`) hold the
weights of the same architecture.
"""

import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from places import ASSETS
from safetensors.numpy import save_file

from snella_jax import models
from snella_jax.files import torch_file
from snella_jax.files.errors import CheckpointError
from snella_jax.models import vit
from snella_jax.models.checkpoints.read import read

FILES = {
    "vit/mae.pth": {"heads": 2},
    "vit/classifier/model.safetensors": {"heads": 2},
    "staged/swin.pth": {},
    "staged/swin/model.safetensors": {},
    "staged/convnext.pth": {},
    "staged/convnext/model.safetensors": {},
}
PREFIXES = [
    "module.",
    "model.",
    "backbone.",
    "encoder.",
    "_orig_mod.",
    "module.backbone.",
    "_orig_mod.module.",
    "model_ema.module.",
    "momentum_encoder.",
    "net.trunk.",
]


def same(one, other):
    assert one.config == other.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(other))


def with_prefix(path, name, prefix):
    tensors = {f"{prefix}{name}": t for name, t in read(ASSETS / name).tensors.items()}
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_prefix_changes_nothing(name, tmp_path):
    plain = models.load(ASSETS / name, **FILES[name])
    for index, prefix in enumerate(PREFIXES[:: 1 if name.startswith("vit") else 3]):
        path = with_prefix(tmp_path / f"{index}.safetensors", name, prefix)
        same(models.load(path, **FILES[name]), plain)


@pytest.mark.parametrize("name", ["vit/mae.pth", "staged/swin.pth"])
def test_outputs_are_those_without_a_prefix(name, tmp_path):
    path = with_prefix(tmp_path / "a.safetensors", name, "module.encoder.")
    expected = np.load((ASSETS / name).parent / "expected.npz")
    if name.startswith("vit"):
        model, key = models.load(path, heads=2), "tokens"
        found = model.features(expected["images"])
    else:
        model, key = models.load(path, image_size=(50, 38)), "swin/logits"
        found = model(expected["images"])
    np.testing.assert_allclose(found, expected[key], rtol=0, atol=1e-5)


def test_wrappers_are_in_the_middle_of_names_too(tmp_path):
    """Compiled and sharded block by block: `blocks.0._orig_mod.norm1.weight`."""
    tensors = read(ASSETS / "vit/mae.pth").tensors
    for wrapper in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        wrapped = {
            f"{wrapper}.{name}".replace("blocks.1.", f"blocks.1.{wrapper}."): tensor
            for name, tensor in tensors.items()
        }
        path = tmp_path / f"{wrapper}.safetensors"
        save_file({n: np.ascontiguousarray(t) for n, t in wrapped.items()}, path)
        same(models.load(path, heads=2), models.load(ASSETS / "vit/mae.pth", heads=2))


def timm(width):
    """One block of a ViT for one patch of 2 x 2 under timm's names, all zero."""
    block = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width)}
    block |= {"attn.proj": (width, width), "mlp.fc1": (8, width), "mlp.fc2": (width, 8)}
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 2, width)}
    layers = {f"blocks.0.{name}": shape for name, shape in block.items()}
    layers |= {"patch_embed.proj": (width, 3, 2, 2), "norm": (width,)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("prefix", "of_moco"),
    [
        ("", False),
        ("module.", True),
        ("module.base_encoder.", True),
        ("momentum_encoder.", True),
        ("_orig_mod.module.", True),
        ("backbone.", False),
        ("_orig_mod.", False),
        ("my_module.", False),
    ],
)
def test_no_prefix_chooses_the_heads(prefix, of_moco, tmp_path):
    """MoCo v3's ViT-S has twelve heads of 32 numbers, everybody else's six of 64."""

    def load(width, **options):
        tensors = {f"{prefix}{name}": t for name, t in timm(width).items()}
        save_file(tensors, tmp_path / "small.safetensors")
        return models.load(tmp_path / "small.safetensors", **options).config

    if of_moco:
        with pytest.raises(
            CheckpointError, match=r"12 heads, others have 6: give head"
        ):
            load(384)
    else:
        assert load(384).heads == 6
    assert load(384, heads=12).heads == 12
    assert load(192).heads == 3


# Several sets of weights


@pytest.fixture
def saved(monkeypatch, tmp_path):
    """Loads what PyTorch's file would hold."""

    def load(content, **options):
        monkeypatch.setattr(torch_file, "read", lambda path: content)
        (tmp_path / "file.pth").touch()
        model = models.load(tmp_path / "file.pth", **options)
        return float(model.norm.bias[0])

    return load


def filled(number):
    return {**timm(192), "norm.bias": np.full(192, number, np.float32)}


OPTIMIZER = {"state": {0: {"exp_avg": np.ones(3)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize("place", ["teacher", "state_dict_ema", "model_ema", "student"])
def test_the_only_weights_are_taken_wherever_they_are(place, saved):
    assert saved({"epoch": 3, "optimizer": OPTIMIZER, place: filled(7)}) == 7
    assert saved({place: {"state_dict": filled(7)}, "center": np.ones((1, 4))}) == 7


@pytest.mark.parametrize(
    ("usual", "average"), [("model", "model_ema"), ("state_dict", "state_dict_ema")]
)
def test_of_weights_and_their_average_one_is_taken_aloud(usual, average, saved, caplog):
    content = {average: filled(2), usual: filled(1), "optimizer": OPTIMIZER}
    assert saved(content) == 1
    assert f"'{average}', '{usual}': took '{usual}'; weights=" in caplog.text
    caplog.clear()
    assert saved(content, weights=average) == 2
    assert saved(content, weights=usual) == 1
    assert not caplog.text


def test_of_student_and_teacher_none_is_taken(saved):
    def under(prefix, number):
        return {f"{prefix}{name}": t for name, t in filled(number).items()}

    teacher = under("backbone.", 2) | {"head.mlp.0.weight": np.ones((3, 192))}
    content = {"student": under("module.backbone.", 1), "teacher": teacher}
    with pytest.raises(CheckpointError, match="'student', 'teacher': say which with"):
        saved(content)
    assert saved(content, weights="student") == 1
    assert saved(content, weights="teacher.backbone") == 2  # without its head
    assert saved(content, weights="module.backbone.") == 1
    with pytest.raises(CheckpointError, match=r"mlp\.0\.weight .* no place for it"):
        saved(content, weights="teacher")
    with pytest.raises(CheckpointError, match="has no weights='ema': student"):
        saved(content, weights="ema")
    twice = {"one": under("a.", 1), "two": under("a.", 2)}
    with pytest.raises(CheckpointError, match=r"may be 'one\.a', 'two\.a': say which"):
        saved(twice, weights="a")
    with pytest.raises(
        CheckpointError, match="several sets of weights, '', 'model_ema'"
    ):
        saved(filled(1) | {"model_ema": filled(2)})


@pytest.mark.parametrize("end", ["npz", "safetensors"])
@pytest.mark.parametrize(
    ("one", "other"),
    [("", "ema."), ("model.", "model_ema."), ("base_encoder.", "momentum_encoder.")],
)
def test_two_sets_in_one_list_of_names(one, other, end, tmp_path):
    both = {f"{one}{name}": t for name, t in filled(1).items()}
    both |= {f"{other}{name}": t for name, t in filled(2).items()}
    path = tmp_path / f"both.{end}"
    np.savez(path, **both) if end == "npz" else save_file(both, path)
    with pytest.raises(
        CheckpointError, match=f"several sets.*'{other[:-1]}'.*weights="
    ):
        models.load(path)
    model = models.load(path, weights=other)
    assert model.norm.bias[0] == 2
    models.export(model, tmp_path / "out.safetensors", like=path, weights=other)
    same(models.load(tmp_path / "out.safetensors"), model)


def test_a_set_of_a_folder(tmp_path):
    source = shutil.copytree(ASSETS / "vit/classifier", tmp_path / "source")
    tensors = read(source).tensors
    both = {f"{at}.{name}": t for at in ("raw", "ema") for name, t in tensors.items()}
    save_file(both, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'ema\.vit', 'raw\.vit': say which"):
        models.load(source)
    same(models.load(source, weights="ema"), models.load(ASSETS / "vit/classifier"))
    same(
        vit.load(read(source), weights="raw"),
        models.load(ASSETS / "vit/classifier"),
    )


def test_names_that_differ_by_a_prefix_alone(tmp_path):
    tensors = {f"module.{name}": t for name, t in timm(192).items()}
    save_file(tensors | {"cls_token": np.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"differ by the prefix 'module\.' alone"):
        models.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["/embedding/kernel", ".cls", "a..cls", "//"])
def test_names_of_separators_alone_end(name, tmp_path):
    np.savez(tmp_path / "a.npz", **{name: np.ones(3), "cls": np.ones(3)})
    with pytest.raises(CheckpointError):
        models.load(tmp_path / "a.npz")


def test_an_encoder_of_a_larger_model_is_refused(tmp_path):
    """Its own config is inside the other's."""
    source = shutil.copytree(ASSETS / "vit/classifier", tmp_path / "source")
    for key in ("encoder", "vision_config"):
        (source / "config.json").write_text(
            f'{{"{key}": {{"hidden_act": "relu"}}}}', "utf-8"
        )
        with pytest.raises(CheckpointError, match=f"larger model, with {key}"):
            models.load(source)


def test_what_only_simmim_has_is_left_out(tmp_path):
    """Its Swin is the `encoder`, beside a `decoder`."""
    path = with_prefix(tmp_path / "a.safetensors", "staged/swin.pth", "encoder.")
    tensors = dict(read(path).tensors)
    del tensors["encoder.head.weight"], tensors["encoder.head.bias"]
    tensors["encoder.mask_token"] = np.ones((1, 1, 4), np.float32)
    tensors["decoder.0.weight"] = np.ones((4, 16, 1, 1), np.float32)
    save_file(tensors, path)
    model = models.load(path, num_classes=0)
    same(model, models.load(ASSETS / "staged/swin.pth", num_classes=0))
    models.export(model, tmp_path / "out.safetensors", like=path)
    expected = {name for name in tensors if "attn_mask" not in name}
    assert read(tmp_path / "out.safetensors").tensors.keys() == expected


# Written again


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.backbone."])
@pytest.mark.parametrize("name", FILES)
def test_an_export_has_the_names_of_its_base(name, prefix, tmp_path):
    path = with_prefix(tmp_path / "base.safetensors", name, prefix)
    model = models.load(path, **FILES[name])
    models.export(model, tmp_path / "out.safetensors", like=path)
    names = read(tmp_path / "out.safetensors").tensors.keys()
    dropped = ("attn_mask", "pooler")
    expected = [n for n in read(path).tensors if not any(end in n for end in dropped)]
    assert sorted(names) == sorted(expected)
    same(models.load(tmp_path / "out.safetensors"), model)


@pytest.mark.parametrize("name", ["vit/pooled/model.safetensors", "vit/mae.pth"])
@pytest.mark.parametrize("prefix", ["module.", "module.vit."])
def test_a_new_head_stands_beside_the_backbone(name, prefix, tmp_path):
    path = with_prefix(tmp_path / "base.safetensors", name, prefix)
    model = models.load(path, heads=2, num_classes=4)
    model.head.bias[...] += np.arange(4.0)
    models.export(model, tmp_path / "out.safetensors", like=path)
    same(models.load(tmp_path / "out.safetensors"), model)


@pytest.mark.reference
def test_pytorchs_own_files(tmp_path, caplog):
    import torch

    state = {name: torch.tensor(t) for name, t in filled(1).items()}
    average = {f"module.{name}": torch.tensor(t) for name, t in filled(2).items()}
    torch.save({"model": state, "model_ema": average, "epoch": 3}, tmp_path / "a.pth")
    assert models.load(tmp_path / "a.pth").norm.bias[0] == 1
    assert "took 'model'" in caplog.text
    assert models.load(tmp_path / "a.pth", weights="model_ema").norm.bias[0] == 2
