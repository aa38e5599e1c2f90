"""A tiny MobileSAM, for tests that share it and do not change it."""

import functools

import numpy as np
from places import ASSETS

from snella_jax.files import torch_file
from snella_jax.models import sam

DATA = ASSETS / "mobile_sam"
FILE = DATA / "mobile_sam.pt"
EXPECTED = dict(np.load(DATA / "expected.npz"))
SIZE = EXPECTED["images"].shape[1:3]


def state(file=FILE):
    return {name: np.asarray(tensor) for name, tensor in torch_file.read(file).items()}


@functools.cache
def loaded(path=FILE, **options):
    """A model that tests share and do not change."""
    return sam.load(path, **options)


def encoder(path=FILE, **options):
    return loaded(path, image_size=SIZE, **options).encoder


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=atol * np.abs(expected).max()
    )
