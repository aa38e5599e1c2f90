"""Configs of runs on masks: rates of what trains besides, and the presets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sams
from flax import nnx

from experiments.config.polyp import POLYP, PolypConfig
from experiments.pretrained import sam_models
from experiments.training.rounds import Rounds
from snella_jax.models import sam


def test_what_trains_besides_can_have_a_rate_of_its_own():
    """In one step of Adam every number moves by its rate, but for a tiny gradient."""
    config = dataclasses.replace(POLYP["minisam"].config, trainable_lr=1e-4)
    tree = {
        "decoder": {"fc": jnp.ones(2)},
        "encoder": {"decoder": jnp.ones(2), "adapter": {"a": jnp.ones(2)}},
        "prompts": {"no_mask_embed": jnp.ones(2), "other": jnp.ones(2)},
    }
    rounds = Rounds(main=2, size=2)
    for method, own in (("snella", 1e-4), ("decoder", 3e-4)):
        tx = dataclasses.replace(
            config.recipe(method),
            weight_decay=0,
            no_decay="",
            schedule="constant",
            warmup_epochs=0,
        ).optimizer(rounds)
        updates, _ = tx.update(tree, tx.init(tree), tree)
        moved = jax.tree.map(lambda leaf: -float(leaf[0]), updates)
        lr = config.settings[method].lr
        assert moved["encoder"]["adapter"]["a"] == pytest.approx(lr, rel=1e-4)
        assert moved["encoder"]["decoder"] == pytest.approx(lr, rel=1e-4)
        assert moved["decoder"]["fc"] == pytest.approx(own, rel=1e-4)
        assert moved["prompts"] == pytest.approx(
            {"no_mask_embed": own, "other": lr}, rel=1e-4
        )
    with pytest.raises(ValueError, match="trainable_lr=0: expected a positive"):
        dataclasses.replace(config, trainable_lr=0).check()


def test_presets_are_configs_that_could_run():
    for preset in POLYP.values():
        preset.config.check()
    paper, released = (POLYP[n].config for n in ("sam_vit_b_kvasir", "released"))
    rates = {own.lr for own in paper.settings.values()}
    assert rates == {1e-3} and (paper.batch, paper.epochs) == (1, 20)
    assert paper.trains_on_all and paper.followed is None
    assert released.followed == "test" and released.random_prompts
    assert released.schedule == "annealed_epoch"
    assert {own.lr for own in released.settings.values()} == {2e-4}
    assert released.settings["snella_released"].undropped == ".*/proj"


def test_released_prompts_are_drawn_anew():
    """The decoder's embedding and positions alone, by the seed."""
    config = PolypConfig(model=str(tiny_sams.FILES["tiny_vit"]), image_size=32)
    plain, *drawn = (
        sam_models.load(dataclasses.replace(config, random_prompts=random, seed=seed))
        for random, seed in ((False, 0), (True, 0), (True, 0), (True, 1))
    )
    assert isinstance(plain, sam.Sam)
    first, same, other = (
        {"/".join(map(str, p)): np.array(v[...])
         for p, v in nnx.to_flat_state(nnx.state(model))} for model in drawn
    )  # fmt: skip
    before = {
        "/".join(map(str, path)): np.array(value[...])
        for path, value in nnx.to_flat_state(nnx.state(plain))
    }
    changed = {path for path in before if (before[path] != first[path]).any()}
    assert changed == {"prompts/no_mask_embed", "prompts/position_matrix"}
    for path in changed:
        np.testing.assert_array_equal(first[path], same[path])
        assert (first[path] != other[path]).any()
