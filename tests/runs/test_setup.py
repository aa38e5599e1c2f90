"""Preparing a run: samples of the test split."""

import numpy as np
import pytest

from experiments.config.images import ImageConfig
from experiments.runs import setup
from experiments.tasks import catalogue


def test_a_test_split_can_be_sampled_the_same_way_each_time():
    task = catalogue.load("digits")
    samples = [setup.sampled(task.test, 50) for _ in range(2)]
    assert len(samples[0]) == 50
    np.testing.assert_array_equal(samples[0].labels, samples[1].labels)
    assert setup.sampled(task.test, 10_000) is task.test
    assert setup.sampled(task.test, None) is task.test
    with pytest.raises(ValueError, match="test_images=0"):
        ImageConfig(test_images=0).check()
