"""Arrays in the byte order of other machines, or in Fortran's, are numbers like others.

HDF5, FITS and `.npy` files may have them; JAX and safetensors take them for granted in
neither way.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snella_jax as snella
from snella_jax import linen
from snella_jax.models.checkpoints import read, write

NUMBERS = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
ORDERS = {
    "fortran": np.asfortranarray(NUMBERS),
    "big": NUMBERS.astype(">f4"),
    "both": np.asfortranarray(NUMBERS.astype(">f4")),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_what_is_written_is_read(suffix, order, tmp_path):
    path = tmp_path / f"weights{suffix}"
    write.write_file(path, {"w": ORDERS[order]}, {})
    found = read.read(path).tensors["w"]
    np.testing.assert_array_equal(found, NUMBERS)
    assert found.dtype.isnative and jnp.asarray(found).dtype == np.float32


@pytest.mark.parametrize("order", ORDERS)
def test_archives_of_numpy_are_read(order, tmp_path):
    np.savez(tmp_path / "weights.npz", w=ORDERS[order])
    found = read.read(tmp_path / "weights.npz").tensors["w"]
    np.testing.assert_array_equal(jnp.asarray(found), NUMBERS)


@pytest.mark.parametrize("order", ORDERS)
def test_variables_of_linen(order, tmp_path):
    module, x = nn.Dense(5), jnp.ones((2, 3))
    own = {"params": {"kernel": NUMBERS, "bias": NUMBERS[0]}}
    other = {"params": {"kernel": ORDERS[order], "bias": ORDERS[order][0]}}
    config = snella.SnellaConfig(rank=2, targets="", trainable="", allocation="fixed")
    outputs = []
    for index, variables in enumerate((own, other)):
        adapters, params = linen.adapt(
            module, variables, config, x, key=jax.random.key(0)
        )
        outputs.append(adapters.apply({"params": params}, x))
        adapters.save(params, tmp_path / str(index))
        for folder in range(index + 1):
            again, loaded = linen.load(module, variables, tmp_path / str(folder), x)
            np.testing.assert_array_equal(again.apply(loaded, x), outputs[0])
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("order", ORDERS)
def test_a_layer_that_holds_such_an_array_is_saved_and_known(order, tmp_path):
    """NNX keeps what it is given; nothing is called here."""
    config = snella.SnellaConfig(rank=2, targets="fc", trainable="", allocation="fixed")

    class Net(nnx.Module):
        def __init__(self, numbers):
            self.fc = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
            self.other = nnx.Param(numbers)

    snella.save(snella.adapt(Net(ORDERS[order]), config, rngs=nnx.Rngs(1)), tmp_path)
    snella.load(Net(jnp.asarray(NUMBERS)), tmp_path)
    with pytest.raises(snella.CheckpointError, match="other: its numbers"):
        snella.load(Net(NUMBERS + 1), tmp_path)
