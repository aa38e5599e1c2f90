"""Base models: random weights as a control."""

import numpy as np
import pytest
from places import ASSETS

from experiments.config.images import ImageConfig
from experiments.pretrained import base_models


def test_random_weights_are_those_of_the_seed():
    kernels = [
        np.asarray(base_models.load(config, 3).blocks.mlp.fc1.kernel[...])
        for config in (
            ImageConfig(random_weights=True), ImageConfig(random_weights=True),
            ImageConfig(random_weights=True, seed=1), ImageConfig(),
        )
    ]  # fmt: skip
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert all((kernels[0] != other).mean() > 0.9 for other in kernels[2:])


def test_a_language_model_is_no_model_of_images():
    config = ImageConfig(model=str(ASSETS / "llama/own"))
    with pytest.raises(ValueError, match=r"own is a LLaMA, which has no .*num_classes"):
        base_models.load(config, classes=3)
