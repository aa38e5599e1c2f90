"""A method is a class and a line in the registry, and nothing else."""

import dataclasses
import json
import re
from typing import Any, ClassVar

import numpy as np
import pictures
import pytest
from flax import nnx
from places import ROOT
from tiny import CONFIG, TINY, adapted, base

from experiments import vtab
from experiments.config import command_line, presets, run_config
from experiments.config.images import ImageConfig
from experiments.methods import registry
from experiments.methods.method import Method
from experiments.training.session import Scope
from snella_jax.nnx.surgery import freeze


@dataclasses.dataclass(frozen=True)
class Scales(Method):
    """Scales of norms train, from a value on."""

    title: ClassVar[str] = "Scales"

    lr: float = 1e-3
    """Peak learning rate."""
    start: float = 1.0
    """Factor on all scales before training."""

    def adapt(self, base: Any, scope: Scope) -> Any:
        model = nnx.clone(base)
        for _, node in nnx.iter_graph(model):
            if isinstance(node, nnx.LayerNorm):
                node.scale[...] = node.scale[...] * self.start
        freeze(model, rf"{scope.trainable}|.*/scale")
        return model


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(registry.METHODS, "scales", Scales())


def test_a_new_method_is_parsed_trained_and_reported(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures.draw(tmp_path / "cats")
    words = ["--config=quickstart", "--task=cats", f"--model={pictures.CLASSIFIER}"]
    words += ["--image_size=24", "--batch=4", "--warmup_epochs=0", "--epochs=1"]
    words += ["--mesh=data=1", "--out=run", "--methods", "scales"]
    summary = vtab.main([*words, "--scales.start", "0.5"])
    result = summary["methods"]["scales"]
    assert result["settings"] == {"lr": 1e-3, "weight_decay": 1e-4}
    assert result["trainable"] > 0 and result["weights_moved"] == 0
    known = json.loads((tmp_path / "run/config.json").read_text("utf-8"))
    assert known["scales"] == {"lr": 1e-3, "weight_decay": 1e-4, "start": 0.5}
    config = command_line.from_values("x", known, ImageConfig(), tmp_path)
    assert config.settings["scales"] == Scales(start=0.5)
    assert run_config.differing(known, config) == []


def test_presets_of_before_have_it_too(toy):
    config = presets.VTAB["quickstart"].config.with_settings(scales=Scales(start=2.0))
    model = config.settings["scales"].adapt(base(), config.scope())
    np.testing.assert_allclose(model.blocks.norm1.scale[...], 2.0)


def test_what_the_registry_holds_is_titled_and_explained():
    for name, method in registry.METHODS.items():
        assert method.title and type(method).__doc__.endswith("."), name
        assert set(method.knobs) <= {f.name for f in dataclasses.fields(method)}
        method.check(name)
    assert len({m.title for m in registry.METHODS.values()}) == len(registry.METHODS)


def test_settings_of_no_method_are_refused():
    with pytest.raises(ValueError, match="'lorra'; did you mean lora"):
        ImageConfig(methods=("lorra",)).check()


# Cost at inference


def bottleneck(width, rank):
    return width * rank + rank + rank * width + width


D, L = TINY.width, TINY.depth
KEPT = {
    "vpt_shallow": 10 * D,
    "vpt_deep": L * 2 * D,
    "vqt": L * D + L * D * 3,
    "mlp3": 2 * (D * D + D),
    "adapter": L * bottleneck(D, 8),
    "adaptformer": L * bottleneck(D, 8),
    "mosa": L * bottleneck(D, 8),
    "noah": 3 * D + bottleneck(D, 2),
}


@pytest.mark.parametrize("name", sorted(registry.METHODS.keys() - {"spt_adapter"}))
def test_what_merges_costs_nothing_at_inference(name):
    """And the others as many parameters as their modules have."""
    method, model = CONFIG.settings[name], adapted(name)
    assert method.kept(base(), method.merged(model)) == KEPT.get(name, 0)


def test_the_docs_say_what_costs_nothing():
    text = (ROOT / "docs/training.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|", text, re.M)
    said = {name: "nothing" in cost for name, cost in rows}
    assert {name: said[name] for name in registry.METHODS} == {
        name: name not in KEPT and name != "spt_adapter" for name in registry.METHODS
    }
