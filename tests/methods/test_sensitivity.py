"""The first stage: which weights it finds, and how these train."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from tiny import CONFIG, DATA, SOURCE, TINY, TRANSFORM, WEIGHTS, base, leaves, scores

import snella_jax as snella
from experiments import files
from experiments.data.task import Task
from experiments.methods import gps, sensitivity, sparse, spt
from experiments.methods.masked import MaskedSnella
from experiments.runs import images, setup, train_method
from experiments.training import sharding
from experiments.training.classification import Classification
from experiments.training.session import Scope
from snella_jax.models.vit import ViT


def test_scores_are_the_gradients_of_the_training_images():
    """Against finite differences of the loss, of one kernel's entry each."""
    images = jax.random.normal(jax.random.key(3), (6, 8, 8, 1))
    labels = jnp.array([0, 1, 2, 0, 1, 2])
    with jax.enable_x64(True):
        wide = dataclasses.replace(TINY, dtype=jnp.float64, param_dtype=jnp.float64)
        model = ViT(wide, rngs=nnx.Rngs(0))
        model = sensitivity.headed(model, jax.random.key(1))
        graphdef, kernels, rest = sensitivity.split(model, CONFIG.targets)
        zeros, batch = sensitivity.zeros(kernels), {"image": images, "label": labels}
        found = {}
        for rule in ("squares", "contrastive"):
            loss = sensitivity.loss_of(model, rule, Classification())
            step = sensitivity.scoring_step(graphdef, rule, loss)
            found[rule] = step(zeros, kernels, rest, batch)

        def losses(shift):
            kernel = model.blocks.mlp.fc1.kernel
            before = kernel[...]
            kernel[...] = before.at[1, 2, 3].add(shift)
            logits = jax.nn.log_softmax(model(images))
            features = np.asarray(model.pooled(images))
            kernel[...] = before
            entropy = -logits[jnp.arange(6), labels].mean()
            return np.array([entropy, contrastive(features, np.asarray(labels))])

        slope = (losses(1e-5) - losses(-1e-5)) / 2e-5
        squares, signed = (
            float(found[rule]["blocks"]["mlp"]["fc1"]["kernel"][...][1, 2, 3])
            for rule in ("squares", "contrastive")
        )
    assert squares == pytest.approx(slope[0] ** 2, rel=1e-4)
    assert signed == pytest.approx(slope[1], rel=1e-4)


def contrastive(features, labels):
    """The loss by loops: an anchor at a time, the mean over its positives."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similar = np.exp(unit @ unit.T / 0.07)
    anchors = []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        total = sum(similar[i, j] for j in others)
        same = [np.log(similar[i, j] / total) for j in others if labels[j] == labels[i]]
        if same:
            anchors.append(-np.mean(same))
    return np.mean(anchors)


def test_images_without_a_companion_do_not_count():
    features = np.random.default_rng(0).normal(size=(5, 4))
    labels = np.array([0, 0, 1, 2, 2])
    found = sensitivity.contrastive(jnp.asarray(features), jnp.asarray(labels))
    assert float(found) == pytest.approx(contrastive(features, labels), rel=1e-5)
    alone = sensitivity.contrastive(jnp.asarray(features), jnp.arange(5))
    assert float(alone) == 0


def test_gps_takes_the_largest_of_every_column():
    own = np.array([[[1, 5], [2, 4], [0, 6]], [[9, 0], [8, 7], [1, 2]]])
    assert gps.largest(own, 1).tolist() == [[2, 5], [0, 3]]
    assert sorted(gps.largest(own, 2)[1].tolist()) == [0, 2, 3, 5]
    with pytest.raises(ValueError, match=r"per_neuron=9: blocks/attn/.* has 8 inputs"):
        gps.selected(scores("contrastive"), 9)


def test_spt_takes_the_largest_of_all():
    found = spt.sensitive({"a": np.array([[1, 9]]), "b": np.array([[8, 2, 7]])}, 0.6)
    places = {path: own.tolist() for path, own in found.items()}
    assert places == {"a": [1], "b": [0, 2]}


def test_spt_structures_matrices_with_enough_sensitive_weights():
    """They have as many as a branch has parameters, divided by the ease, or more."""
    own = {path: np.zeros(v.shape) for path, v in scores("squares").items()}
    own["blocks/attn/query"][0, :4] = 1  # 32 of 64; a branch of rank 2 has 32
    own["blocks/attn/key"][1, :3] = 1  # 24
    share = 56 / WEIGHTS
    places = spt.sensitive(own, share)
    method = spt.SptLora(rank=2, ease=1.0)
    model = method.adapt(base(), Scope("", "head", places=places))
    trains = {path for path in leaves(model, snella.Factor)}
    assert trains == {
        "blocks/0/attn/query/lora/a",
        "blocks/0/attn/query/lora/b",
        "blocks/1/attn/key/sparse/values",
    }
    assert model.blocks[1].attn.key.sparse.places[...].tolist() == list(range(24))


def test_single_weights_train_as_under_a_mask():
    """The values' gradient is the kernel's at their places; merged they are added."""
    layer = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (3, 5))
    graphdef, state = nnx.split(layer)
    dense = jax.grad(lambda s: jnp.sum(nnx.merge(graphdef, s)(x) ** 2))(state)
    model = nnx.clone(layer)
    places = np.array([3, 17, 6])
    sparse.loosen(model, places)
    graphdef, values, rest = nnx.split(model, snella.Factor, ...)
    own = jax.grad(lambda v: jnp.sum(nnx.merge(graphdef, v, rest)(x) ** 2))(values)
    expected = dense["kernel"][...].reshape(-1)[places]
    np.testing.assert_allclose(own["sparse"]["values"][...], expected, rtol=1e-5)
    model.sparse.values[...] = jnp.array([1.0, 2.0, 3.0])
    moved = np.array(layer.kernel[...]).reshape(-1)
    moved[places] += [1, 2, 3]
    holder = nnx.List([model])
    merged = sparse.merge(holder)[0]
    np.testing.assert_allclose(merged.kernel[...].reshape(-1), moved, rtol=1e-6)
    np.testing.assert_allclose(merged(x), model(x), rtol=1e-5)


@pytest.mark.parametrize("name", ["spt_lora", "gps", "lora"])
def test_targets_are_linear_layers(name):
    config = dataclasses.replace(CONFIG, targets=r"patch_embed|blocks/.*/fc1")
    with pytest.raises(ValueError, match="patch_embed: expected"):
        setup._adapted(name, config, base())


def test_scores_that_say_nothing_are_refused():
    """Batches of one image have no companions; a pixel may be anything."""
    where = (DATA, Classification(), sharding.make("data=1"))
    with pytest.raises(RuntimeError, match="several images of a class"):
        sensitivity.scores(base(), CONFIG.targets, "contrastive", *where, 1, 0)
    broken = base()
    broken.blocks.mlp.fc1.kernel[...] *= np.nan
    with pytest.raises(FloatingPointError, match="first stage is not finite"):
        sensitivity.scores(broken, CONFIG.targets, "squares", *where, 8, 0)


def test_what_was_located_is_kept_for_a_run_that_goes_on(tmp_path, monkeypatch):
    """The values of a checkpoint belong to these places, whatever scores say later."""
    task = Task("tiny", 3, SOURCE, SOURCE, SOURCE)
    config = dataclasses.replace(CONFIG, model="none", batch=8)
    quiet = Console(quiet=True)
    setting = images.ImageRun(
        config, task, base(), sharding.make("data=1"), quiet, tmp_path
    )
    vars(setting)["transforms"] = (TRANSFORM, TRANSFORM)
    first = train_method.adapted("gps", setting)
    monkeypatch.setattr(sensitivity, "scores", None)
    again = train_method.adapted("gps", setting)
    for path, value in leaves(first).items():
        np.testing.assert_array_equal(leaves(again)[path], value)
    assert [p.name for p in tmp_path.iterdir()] == ["located_gps.npz"]


def test_a_mask_is_that_of_its_density(tmp_path):
    """Trials of a search share what was located, but for other densities."""
    task = Task("tiny", 3, SOURCE, SOURCE, SOURCE)
    quiet, one, found = Console(quiet=True), sharding.make("data=1"), {}
    for density in (0.3, 0.1):
        own = {"snella_masked": MaskedSnella(target_density=density)}
        config = dataclasses.replace(CONFIG, model="none", batch=8, settings=own)
        setting = images.ImageRun(config, task, base(), one, quiet, tmp_path)
        vars(setting)["transforms"] = (TRANSFORM, TRANSFORM)
        train_method.adapted("snella_masked", setting)
        places = files.load(tmp_path / f"located_snella_masked_{density:g}.npz")
        found[density] = sum(int(np.sum(place)) for place in places.values())
    assert found[0.1] == pytest.approx(found[0.3] / 3, abs=2)
    assert len(list(tmp_path.iterdir())) == 2
