"""Grad-CAM against closed forms, its share inside masks, and NMI of clusters."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.studies import clusters, grad_cam, heat
from experiments.studies.comparison import Row
from experiments.studies.tuned import BEFORE
from snella_jax.models import vit
from snella_jax.models.layers import stack


def tiny(**changes):
    config = vit.ViTConfig(
        width=8, depth=3, heads=2, patch_size=2, image_size=(4, 6), num_classes=3,
        **changes,
    )  # fmt: skip
    model = vit.ViT(config, rngs=nnx.Rngs(0))
    model.head.kernel[...] = jax.random.normal(jax.random.key(3), (8, 3))  # from 0
    return model


def test_the_heat_of_a_linear_score_is_its_closed_form():
    """Of `sum_p c_p v . x_p` the gradient of a patch is `c_p v`."""
    rng = np.random.default_rng(0)
    tokens, c, v = (rng.normal(size=n) for n in ((3, 5, 4), (3, 5), (3, 4)))

    def score(x):
        return (c * (x * v[:, None]).sum(-1)).sum(-1)

    found = heat.grad_cam(score, jnp.asarray(tokens))
    expected = np.zeros((3, 5))
    for image in range(3):
        weights = np.mean([share * v[image] for share in c[image]], axis=0)
        for patch in range(5):
            expected[image, patch] = max(0.0, weights @ tokens[image, patch])
    assert 0 < (expected > 0).mean() < 1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_heat_of_a_vit_agrees_with_the_gradient_of_a_norms_bias():
    """A norm's bias moves all tokens alike: its gradient is the sum of theirs."""
    model = tiny(class_token=False, pool="mean")
    images = jax.random.normal(jax.random.key(1), (1, 4, 6, 3))

    @jax.jit
    def weights(images):
        def logit(bias):
            own = nnx.clone(model)
            whole = own.blocks.norm1.bias
            whole[...] = whole[...].at[1].add(bias)
            return own(images)[0, 2]

        return jax.grad(logit)(jnp.zeros(8)) / 6

    @jax.jit
    def tokens(images):
        (entering,) = model.features(images, layers=(0,))
        return stack.row(model.blocks, 1).norm1(entering)[0]

    found = jax.jit(lambda x: heat.of_images(model, x, jnp.array([2]), 1))(images)
    expected = np.maximum(tokens(images) @ weights(images), 0).reshape(1, 2, 3)
    assert found.max() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_blocks_count_from_both_ends():
    model = nnx.eval_shape(tiny)
    assert [heat.block_of(model, block) for block in (1, 2, -1, -2)] == [1, 2, 2, 1]
    for block in (0, 3, -3):
        with pytest.raises(ValueError, match=r"expected 1 to 2, .* -1 to -2"):
            heat.block_of(model, block)
    with pytest.raises(ValueError, match="is a Linear: expected a ViT"):
        heat.block_of(nnx.eval_shape(lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(0))), -1)


def test_shares_are_paired_by_image():
    """A model before tuning that all seeds share, and one that has gained 20 points."""
    before = np.array([0.2, 0.4, 0.6])
    gains = {0: np.array([0.1, 0.2, 0.3]), 1: np.array([0.1, 0.2, 0.3])}
    found = grad_cam.compared({
        BEFORE: {0: before, 1: before},
        "SNELLA-8": {seed: before + own for seed, own in gains.items()},
    })  # fmt: skip
    assert found["inside"][BEFORE]["value"] == pytest.approx(40)
    assert found["inside"]["SNELLA-8"]["value"] == pytest.approx(60)
    (gap,) = found["differences"]
    assert (gap["model"], gap["other"]) == ("SNELLA-8", BEFORE)
    assert gap["value"] == pytest.approx(20)
    half = 4.302653 * 10 / 3**0.5  # Student's table, of two degrees of freedom
    assert (gap["low"], gap["high"]) == pytest.approx((20 - half, 20 + half))


def test_images_without_heat_count_for_no_model():
    """Masks over the left half; the last image has no heat before tuning."""
    mask = np.repeat(np.uint8([[255, 0]]), 2, axis=0)
    cell = SimpleNamespace(
        task="stamps", row=Row("linear"), label="", result={"test_accuracy": 0.5}
    )
    task = SimpleNamespace(test=[{"mask": mask}] * 3)
    probe = SimpleNamespace(setup={"model": "vit"}, task=task, cell=cell)
    before = np.array([[[1.0, 1]], [[1, 3]], [[0, 0]]])
    after = np.array([[[1.0, 0]], [[3, 1]], [[0, 5]]])
    found = grad_cam._measured(probe, [], {BEFORE: {0: before}, "LoRA-8": {0: after}})
    assert (found["test_images"], found["without_heat"]) == (3, 1)
    assert found["mask"]["value"] == 50
    inside = {label: own["value"] for label, own in found["inside"].items()}
    assert inside == {BEFORE: 37.5, "LoRA-8": 87.5}
    assert found["differences"][0]["value"] == 50
    table = grad_cam._table([found])
    assert table.row_count == 2  # before tuning, the mask itself


def test_clusters_that_are_the_classes_have_an_nmi_of_one():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 10)
    apart = 50 * np.eye(4)[labels] + rng.normal(size=(40, 4))
    found, chance = clusters.nmi(apart, labels, starts=3)
    assert found == pytest.approx([1, 1, 1])
    assert all(0 < value < 0.5 for value in chance)
    noise, _ = clusters.nmi(rng.normal(size=(40, 4)), labels, starts=3)
    assert max(noise) < 0.5
