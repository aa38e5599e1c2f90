"""Preparing a run: samples of the test split."""

import numpy as np
import pytest

from experiments.config.run_config import RunConfig
from experiments.runs import setup
from experiments.tasks import catalogue


def test_a_test_split_can_be_sampled_the_same_way_each_time():
    task = catalogue.load("digits")
    samples = [setup._sampled(task, 50).test for _ in range(2)]
    assert len(samples[0]) == 50
    np.testing.assert_array_equal(samples[0].labels, samples[1].labels)
    assert setup._sampled(task, 10_000).test is task.test
    assert setup._sampled(task, None) is task
    with pytest.raises(ValueError, match="test_images=0"):
        RunConfig(test_images=0).check()
