"""One pass together and one for each: both are timed, and give the same."""

import jax
import numpy as np
import pytest
from flax import nnx

import snella_jax as snella
from experiments.benchmarks import several


def test_both_ways_are_timed_in_turn():
    config = snella.SnellaConfig(
        rank=2,
        kernel="linear",
        gate="none",
        target_density=1,
        targets="layers/0",
        trainable="layers/1",
    )
    base = nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in (0, 1)))
    adapters = [snella.adapt(base, config, rngs=nnx.Rngs(seed)) for seed in (1, 2)]
    for model in adapters:
        b = model.layers[0].adapter.b
        b[...] = jax.random.normal(jax.random.key(len(b.shape)), b.shape)
    images = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    row = several._timed(adapters, images, several.SeveralConfig(repetitions=3))
    assert row["adapters"] == 2 and row["difference"] < 1e-6
    pairs = zip(row["apart_cpu_seconds"], row["together_cpu_seconds"], strict=True)
    assert row["apart_of_together"] == sorted(a / b for a, b in pairs)[1]


def test_one_adapter_is_no_comparison():
    with pytest.raises(SystemExit, match="at least 2 adapters"):
        several.main(["--counts", "1"])
