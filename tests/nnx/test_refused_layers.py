"""Layers and weights that cannot be adapted, and what is said of them."""

import jax.numpy as jnp
import pytest
from flax import nnx
from modules import Doubled, Holder

import snella_jax as snella

RANK = 4


class Tied(nnx.Module):
    """Two layers with one weight."""

    def __init__(self, rngs):
        self.fc1, self.fc2 = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)
        self.fc2.kernel = self.fc1.kernel


class TiedInAList(nnx.Module):
    """A layer whose weight lies in a list, too."""

    def __init__(self, rngs):
        self.fc = nnx.Linear(6, 6, rngs=rngs)
        self.used = nnx.data([self.fc.kernel])


class TwoNames(nnx.Module):
    """One weight with two names."""

    def __init__(self, rngs):
        self.w = self.v = nnx.Param(jnp.ones((6, 6)))


def masked(rngs):
    return nnx.Conv(2, 3, (1,), mask=jnp.ones((1, 2, 3)), rngs=rngs)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda r: Tied(r), {"targets": "fc."}, "fc1, fc2 are tied to another's"),
        (lambda r: Tied(r), {"targets": "fc1"}, "fc1 are tied to another's"),
        (lambda r: TiedInAList(r), {"targets": "fc"}, "fc are tied to another's"),
        (lambda r: Holder(Doubled(6, 6, rngs=r)), {"path": "parallel"},
         'Doubled has a call of its own(.|\n)*expected path="merged"'),
        (lambda r: Holder(masked(r)), {}, "convolution with a mask"),
        (lambda r: Holder(nnx.Einsum("BD,SDd->SBd", (3, 6, 2), rngs=r)),
         {"path": "parallel", "drop_path": 0.1}, "belongs to the weight"),
        (lambda r: Holder(nnx.vmap(nnx.vmap(lambda r: nnx.Linear(4, 5, rngs=r)),
            out_axes=2)(r.split((3, 2)))), {}, "of a stack in front of it"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_adapted_are_refused(model, options, message):
    config = snella.SnellaConfig(
        **{"rank": RANK, "targets": "layer", "trainable": ""} | options
    )
    with pytest.raises(ValueError, match=message):
        snella.adapt(model(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))


def test_a_weight_with_two_names_is_refused():
    config = snella.SnellaConfig(rank=RANK, targets="w", trainable="")
    layouts = {"w": snella.Layout((6,), (6,))}
    with pytest.raises(ValueError, match="w are tied to another's, or have two names"):
        snella.adapt(TwoNames(nnx.Rngs(0)), config, rngs=nnx.Rngs(1), layouts=layouts)


def test_parameters_that_are_trees_are_kept_and_cast():
    """As some models hold tables: their arrays take `frozen_dtype`, the rest stays."""

    class Tables(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(6, 6, rngs=rngs)
            self.tables = nnx.Param({"x": jnp.ones(3), "size": 3})

    config = snella.SnellaConfig(
        rank=RANK, targets="fc", trainable="", frozen_dtype=jnp.bfloat16
    )
    model = snella.adapt(Tables(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    found = model.tables.get_value()
    assert found["x"].dtype == jnp.bfloat16 and found["size"] == 3


@pytest.mark.parametrize("pieces", [0, -2, 1.5])
def test_pieces_are_counted(pieces):
    for kernel in (snella.kernels.mix_k, snella.kernels.piecewise_linear):
        with pytest.raises(ValueError, match=f"pieces={pieces}: expected a whole"):
            kernel(pieces=pieces)
