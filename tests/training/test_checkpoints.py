"""Checkpoints: trees that are not the file's, and restoring onto another mesh."""

import contextlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from orbax.checkpoint import checkpoint_manager as manager

from experiments.files import MismatchError
from experiments.training import sharding
from experiments.training.checkpoints import Checkpoints
from experiments.training.classification import Classification

(ACCURACY,) = Classification().metrics


def state(mesh, **others):
    """What trains, and Adam's moments, on a mesh."""
    kernels = {"fc1": np.arange(32.0).reshape(4, 8), "fc2": np.ones((8, 4))} | others
    trainable = nnx.State(
        {k: {"kernel": nnx.Param(jnp.asarray(v))} for k, v in kernels.items()}
    )
    return sharding.place(
        {"trainable": trainable, "opt_state": optax.adam(1e-3).init(trainable)}, mesh
    )


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a state over `fsdp` and `tensor`."""
    with contextlib.closing(Checkpoints(tmp_path / "c", ACCURACY)) as saved:
        before = state(sharding.make("fsdp=2,tensor=2"))
        saved.save(3, before, {"next": 7}, None)
        saved.last()
        yield saved


@pytest.mark.parametrize("mesh", ["data=1", "data=2,tensor=2", "fsdp=4"])
def test_a_checkpoint_is_restored_onto_another_mesh(saved, mesh):
    like = state(sharding.make(mesh))
    passed, found, position = saved.newest(jax.tree.map(jnp.zeros_like, like))
    assert (passed, position) == (3, {"next": 7})
    for got, expected in zip(*map(jax.tree.leaves, (found, like)), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.sharding == expected.sharding


def test_a_missing_leaf_is_named(saved):
    """Of google/orbax#2972: fewer blocks in the file than in the model."""
    wanted = state(sharding.make("data=1"), fc3=np.ones((4, 4)))
    lacks = r"it lacks opt_state\.0\.mu\.fc3\.kernel.*, trainable\.fc3\.kernel"
    with pytest.raises(MismatchError, match=lacks):
        saved.newest(wanted)


def test_a_surplus_leaf_is_named(saved):
    wanted = state(sharding.make("data=1"))
    del wanted["trainable"]["fc2"]
    with pytest.raises(MismatchError, match=r"called as its trainable\.fc2\.kernel"):
        saved.newest(wanted)


def test_what_orbax_says_of_every_save_is_left_out(tmp_path, monkeypatch, caplog):
    """Rounds without a value, and a save that waits for the one before it."""
    monkeypatch.setattr(manager, "_WAIT_FOR_PREV_SAVE_WARNING_THRESHOLD_SECS", -1.0)
    with contextlib.closing(Checkpoints(tmp_path / "c", ACCURACY)) as saved:
        for number in range(2):
            saved.save(number, state(sharding.make("data=1")), {"next": 7}, None)
    logging.getLogger("absl").warning("something else")
    said = caplog.text
    assert "something else" in said
    assert "previous save" not in said and "metrics" not in said
