"""The benchmark of fused kernels, and what they need where they are compiled."""

import json
import os
import subprocess
import sys

import pytest

from experiments.benchmarks import kernels
from snella_jax.ops.pallas.target import Target, assumed

LARGE = "4096x11008x16384"


def test_kernels_take_turns_with_plain_jax(tmp_path):
    argv = ["--layers", "8x16x24", "--repetitions", "2", "--dtype", "float32"]
    with assumed(Target("gpu", interpret=True)):
        rows = kernels.main([*argv, "--out", str(tmp_path)])
    assert [row["method"] for row in rows] == ["dense", "lora", "xla", "pallas"]
    assert all(len(row["seconds"]) == 2 for row in rows)
    off = rows[-1]["largest_difference"]
    assert len(off) == 7 and 0 < max(off.values()) < 1e-5
    assert json.loads((tmp_path / "kernels.json").read_text("utf-8")) == rows


@pytest.mark.parametrize(
    ("argv", "message"),
    [((), "no kernels for cpu"), (("--layers", "8x16"), "inputs x outputs x rows")],
)
def test_bad_settings_are_refused(argv, message):
    with pytest.raises(SystemExit, match=message):
        kernels.main(list(argv))


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("layer", "dtype"),
    [(LARGE, "bfloat16"), ("33x17x5", "float32"), ("776x1000x197", "bfloat16")],
)
def test_a_tpu_stores_nothing_of_a_weights_size(tmp_path, monkeypatch, layer, dtype):
    """Compiled for a v5e by libtpu, without it; plain code: 517 MiB for the first."""
    monkeypatch.setattr(kernels, "METHODS", ("pallas",))
    argv = ["--target", "tpu-v5e", "--layers", layer, "--dtype", dtype]
    (row,) = kernels.main([*argv, "--out", str(tmp_path)])
    assert row["temporary_bytes"] <= 2**20


@pytest.mark.cuda_compile
def test_a_gpu_stores_the_merged_weight_alone(tmp_path):
    """Compiled for an H100 by jax[cuda12], without the device; 86 MiB are the weight.

    In a process of its own: the compiler reads its environment when it starts.
    """
    argv = ["--target", "h100", "--layers", LARGE, "776x1088x197"]
    command = [sys.executable, "-m", "experiments.benchmarks.kernels", *argv]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run([*command, "--out", str(tmp_path)], env=environment, check=True)
    rows = json.loads((tmp_path / "kernels.json").read_text("utf-8"))
    mib = {
        (row["layers"], row["method"]): row["temporary_bytes"] / 2**20 for row in rows
    }
    assert mib[LARGE, "pallas"] <= 130
    assert mib[LARGE, "xla"] > 2 * mib[LARGE, "pallas"]  # the test can fail
