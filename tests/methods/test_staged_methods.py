"""Every method on Swin and ConvNeXt, their steps, and the programs that take them."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import called
from flax import nnx
from places import ASSETS
from rich.console import Console

from experiments.benchmarks import workload
from experiments.config.images import ImageConfig
from experiments.data.source import Arrays
from experiments.data.task import Task
from experiments.methods.first_stage import Staged
from experiments.methods.method import by_block
from experiments.methods.registry import METHODS
from experiments.methods.spt import SptAdapter, SptLora
from experiments.pretrained import base_models
from experiments.runs import images
from experiments.studies import overfit
from snella_jax.models import convnext, of, swin
from snella_jax.models.layers.images import IMAGENET_MEAN
from snella_jax.nnx.targets import select

TINY = {
    "swin": swin.SwinConfig(8, (2, 2), (2, 4), 2, image_size=20, num_classes=3),
    "convnext": convnext.ConvNeXtConfig((8, 12), (1, 2), image_size=20, num_classes=3),
}
LOCATED = {"share": 0.3, "ease": 2.0, "rank": 1}
CONFIG = ImageConfig(
    settings={"spt_lora": SptLora(**LOCATED), "spt_adapter": SptAdapter(**LOCATED)}
)
VIT_ALONE = {"vpt_shallow": "VPT", "vpt_deep": "VPT", "vqt": "VQT", "noah": "NOAH"}
IMAGES = jax.random.normal(jax.random.key(0), (2, 20, 20, 3))
LAST = {"swin": r"blocks/1/0/shifted/.*", "convnext": r"blocks/1/1/.*"}
PARTS = "(attn|mlp)/(query|key|value|out|fc1|fc2)"
MATRICES = {
    "swin": rf"blocks/[01]/(plain|shifted)/{PARTS}",
    "convnext": r"blocks/[01]/mlp/(fc1|fc2)",
}


def base(family):
    model = of(TINY[family], nnx.Rngs(0))
    noise = jax.random.normal(jax.random.key(1), model.head.kernel.shape)
    model.head.kernel[...] = noise  # a head of 0 would hide everything
    return model


def adapted(name, own):
    method, scope = CONFIG.settings[name], CONFIG.scope()
    if isinstance(method, Staged):
        scope = dataclasses.replace(scope, places=method.typical(own, scope))
    return method.adapt(own, scope)


def paths(model, kind=nnx.Param):
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {"/".join(map(str, path)) for path, _ in flat}


@pytest.mark.parametrize("family", TINY)
def test_every_method_adapts_or_says_that_it_needs_a_vit(family):
    own, head = base(family), {"head/kernel", "head/bias"}
    for name in METHODS:
        if name in VIT_ALONE:
            with pytest.raises(
                ValueError, match=f"{VIT_ALONE[name]} puts tokens beside"
            ):
                nnx.eval_shape(lambda n=name: adapted(n, own))
            continue
        model = nnx.eval_shape(lambda n=name: adapted(n, own))
        trained = paths(model)
        assert head < trained or name == "mlp3", name
        matrices = {p for p in trained if re.match(rf"{MATRICES[family]}/", p)}
        match name:
            case "full":
                assert trained == paths(own)
            case "partial1":
                rest = trained - head - {"norm/scale", "norm/bias"}
                assert rest and all(re.fullmatch(LAST[family], path) for path in rest)
            case "mlp3":
                assert trained
                assert all(path.startswith("head/layers/") for path in trained)
            case "bias":
                assert trained == head | {p for p in paths(own) if p.endswith("/bias")}
            case "adapter" | "adaptformer" | "mosa":
                assert all("/mlp/bottleneck/" in path for path in trained - head)
            case "ssf":
                assert all("/ssf/" in path for path in trained - head)
            case "spt_lora" | "spt_adapter":
                assert all(path.startswith("blocks/") for path in trained - head)
            case _:
                assert matrices and trained == head | matrices, name
        model.eval()
        graphdef, state = nnx.split(model)
        logits = jax.eval_shape(lambda s, g=graphdef: nnx.merge(g, s)(IMAGES), state)
        assert logits.shape == (2, 3)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("name", ["ssf", "spt_lora", "gps", "dora", "snella_masked"])
def test_what_is_merged_computes_what_was_trained(family, name):
    """With every factor somewhere else than at its start."""
    own = base(family)
    model = adapted(name, own)
    for index, leaf in enumerate(
        jax.tree.leaves(
            nnx.state(model, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Param)
        )
    ):
        noise = 0.1 * np.random.default_rng(index).normal(size=leaf.shape)
        leaf.set_value(jnp.asarray(leaf[...] + np.float32(noise), leaf.dtype))
    merged = METHODS[name].merged(model)
    assert type(merged) is type(own)
    logits, plain, before = (called(m, IMAGES) for m in (model, merged, own))
    np.testing.assert_allclose(plain, logits, atol=2e-4)
    assert not np.allclose(before, logits, atol=1e-2)


def test_places_of_stacked_blocks_have_the_paths_of_lists():
    for family in TINY:
        own = base(family)
        scores = {
            p: np.zeros(x.kernel.shape) for p, x in select(own, CONFIG.targets).items()
        }
        listed = by_block(scores)
        assert listed.keys() == select(of(
            dataclasses.replace(TINY[family], stacked=False), nnx.Rngs(0)
        ), CONFIG.targets).keys()  # fmt: skip
        assert all(own.ndim == 2 for own in listed.values())


def test_a_step_of_a_preset_is_built_and_unknown_ones_are_listed():
    for name, attention in (("swin_b", "xla"), ("convnext_b", None)):
        setting = workload.checked(workload.Setting("snella", name, batch=2))
        one = workload.abstract(setting)
        _, _, loss = jax.eval_shape(one.run, *one.arguments)
        assert loss.shape == () and setting.attention == attention
        assert one.arguments[4]["image"].shape == (2, 224, 224, 3)
    with pytest.raises(ValueError, match="no model is called 'x'"):
        workload.checked(workload.Setting("snella", "x"))
    for method in VIT_ALONE:
        with pytest.raises(ValueError, match=f"method={method}: expected a ViT, not a"):
            workload.checked(workload.Setting(method, "swin_b"))
    assert {n for n, m in METHODS.items() if m.needs_vit} == set(VIT_ALONE)


# Runs


def config(**changes):
    return dataclasses.replace(
        ImageConfig(image_size=32, methods=("snella",)), **changes
    )


def test_models_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("swin_b", "convnext_b"):
        own = config(model=name, random_weights=True, drop_path=0.1)
        model = nnx.eval_shape(lambda c=own: base_models.load(c, 7))
        assert model.config.image_hw == (32, 32) and model.config.num_classes == 7
        assert model.config.drop_path == 0.1
        file, folder, _ = base_models.PUBLISHED[name]
        for said in (name, file):
            with pytest.raises(FileNotFoundError, match=f"get it from {folder}/{file}"):
                base_models.load(config(model=said), 7)
    with pytest.raises(
        ValueError, match="vit_s16: published weights are known of vit_b"
    ):
        base_models.load(config(model="vit_s16"), 7)


def test_published_weights_give_their_transforms():
    own = config(model=str(ASSETS / "staged/swin"))
    model = base_models.load(own, 5)
    assert model.config.num_classes == 5 and model.config.width == 4
    whole, _ = base_models.transforms(own, model)
    assert whole.size == (32, 32) and whole.mean == IMAGENET_MEAN
    random = base_models.load(dataclasses.replace(own, random_weights=True), 5)
    assert random.config == model.config
    kernel = random.patch_embed.kernel[...]
    assert not np.allclose(kernel, model.patch_embed.kernel[...])


@pytest.fixture
def learner(monkeypatch):
    """A ConvNeXt that learns digits in seconds."""
    config = convnext.ConvNeXtConfig((16, 24), (1, 1), image_size=20, num_classes=10)
    monkeypatch.setattr(base_models, "load", lambda *_: of(config, nnx.Rngs(0)))


def learn(out, *words):
    same = ["--config", "quickstart", "--model", "tiny", "--batch", "16"]
    same += ["--methods", "full", "--warmup_epochs", "1", "--clip", "1"]
    same += ["--out", str(out)]
    return overfit.main([*same, *words])


@pytest.mark.slow  # 60 steps
def test_few_images_are_learnt_by_heart(learner, tmp_path, capsys):
    length = "--images=16", "--steps=60", "--round_steps=20"
    found = learn(tmp_path / "all", *length, "--full.lr", "3e-3")
    assert found["accuracy"]["full"][-1] == 1 and found["images"] == 16
    assert json.loads((tmp_path / "all" / "overfit.json").read_text("utf-8")) == found
    assert (tmp_path / "all" / "overfit.png").stat().st_size > 10_000
    assert "100.0%" in capsys.readouterr().out


def test_what_is_not_learnt_is_an_error(learner, tmp_path):
    wrong = functools.partial(pytest.raises, SystemExit)
    with wrong(match="full did not learn every image"):
        learn(tmp_path / "none", "--epochs", "2", "--full.lr", "1e-9")
    with wrong(match="full did not learn every image"):  # there is none to choose by
        learn(tmp_path / "search", "--epochs", "2", "--full.lr", "1e-9", "--search")
    with wrong(match="none exists: name another folder"):
        learn(tmp_path / "none", "--epochs", "2")
    with wrong(match="images=8: expected 16"):
        learn(tmp_path / "few", "--images", "8")
    with wrong(match="some without a stage"):
        learn(tmp_path / "gps", "--methods", "gps")


def test_a_run_says_which_methods_need_a_vit(monkeypatch):
    pixels = np.zeros((64, 20, 20, 3), np.uint8)
    part = Arrays(pixels, np.arange(64) % 3)
    task = Task("noise", 3, part, part, part)
    monkeypatch.setattr(images.catalogue, "load", lambda name, folder: task)
    monkeypatch.setattr(base_models, "load", lambda config, classes: base("swin"))
    with pytest.raises(ValueError, match="a Swin is not"):
        images.prepared("x", config(methods=("vqt",)), Console())
    images.prepared("x", config(methods=("snella", "partial1")), Console())
