"""Two processes with two devices each, against one with four: `helpers/joined.py`."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import joined
import numpy as np
import pytest
from places import ROOT

from experiments.files import load

pytestmark = pytest.mark.slow
PROGRAM = ROOT / "tests/helpers/joined.py"


@contextlib.contextmanager
def started(folder, role):
    """Yields two processes and the files of what they say; kills them at the end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    own = {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"}
    own |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    own["XLA_FLAGS"] = " ".join(flags)
    said = [folder / f"{role}{number}.log" for number in (0, 1)]
    pair = []
    for number, path in enumerate(said):
        with path.open("w", encoding="utf-8") as file:
            one = subprocess.Popen(
                [sys.executable, str(PROGRAM), str(folder), role],
                env=os.environ | own | {"JAX_PROCESS_ID": str(number)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        pair.append(one)
    try:
        yield pair, said
    finally:
        for one in pair:
            one.kill()
            one.wait()


def until_done(pair, said):
    """Waits until both have said that they are done."""
    deadline = time.monotonic() + 1800
    while not all("done\n" in path.read_text("utf-8") for path in said):
        texts = "\n".join(path.read_text("utf-8")[-3000:] for path in said)
        assert all(one.poll() in (None, 0) for one in pair), texts
        assert time.monotonic() < deadline, texts
        time.sleep(0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process has trained and written, and two; these were killed, then."""
    folder = tmp_path_factory.mktemp("runs")
    for name in joined.TARGETS:
        run = joined.Run(name)
        run.train(0, joined.STEPS)
        np.savez(folder / f"{name}_one.npz", **run.values())
        run.write(folder / "one")
    with started(folder, "start") as (pair, said):
        until_done(pair, said)
    assert [one.returncode for one in pair] == [-signal.SIGKILL] * 2
    for number, path in enumerate(said, 1):
        assert f"process {number} of 2 on " in path.read_text("utf-8")
        assert ": 2 x cpu of 4\n" in path.read_text("utf-8")
    return folder


def test_files_of_two_processes_are_byte_for_byte_those_of_one(folder):
    """Of one state: adapters, exported models and files of differences."""
    one, two = (
        {p.relative_to(folder / own): p.read_bytes() for p in found if p.is_file()}
        for own in ("one", "two")
        for found in [(folder / own).rglob("*")]
    )
    assert {path.parts[0] for path in one} == {
        *("llama_adapter", "llama_export", "llama.safetensors"),
        *("vit_adapter", "vit_export.safetensors", "vit.safetensors"),
    }
    assert one == two


@pytest.mark.parametrize("name", joined.TARGETS)
def test_two_processes_train_what_one_does(folder, name):
    one, two = (load(folder / f"{name}_{own}.npz") for own in ("one", "whole"))
    assert one.keys() == two.keys()
    for path, value in one.items():
        if "budgets" in path:
            assert np.abs(value - two[path]).max() <= max(1e-4 * value.max(), 1), path
        else:
            np.testing.assert_allclose(two[path], value, atol=1e-5, err_msg=path)
    moved = {path for path in one if path.endswith("budget")}
    assert moved and any(np.ptp(one[path]) for path in moved)


def test_a_pair_that_was_killed_goes_on_bit_for_bit(folder):
    with started(folder, "resume") as (pair, said):
        until_done(pair, said)
        assert [one.wait() for one in pair] == [0, 0]
    for name in joined.TARGETS:
        whole, again = (load(folder / f"{name}_{o}.npz") for o in ("whole", "resumed"))
        assert whole.keys() == again.keys()
        for path, value in whole.items():
            np.testing.assert_array_equal(again[path], value, err_msg=path)


def test_an_error_in_one_process_ends_both_within_a_minute(tmp_path: Path):
    with started(tmp_path, "fail") as (pair, said):
        deadline = time.monotonic() + 600
        while all(one.poll() is None for one in pair):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        first = time.monotonic()
        codes = [one.wait(timeout=600) for one in pair]
    assert time.monotonic() - first < 60 and 0 not in codes
    assert "the second process has had enough" in said[1].read_text("utf-8")
