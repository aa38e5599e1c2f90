"""A training that is told to stop saves in the midst of a round, and ends as if not."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pictures
import pytest
from places import ROOT

from experiments import vtab
from experiments.training import metric_log, stopping
from experiments.training.checkpoints import Checkpoints
from experiments.training.classification import Classification
from experiments.training.competition import Competition
from experiments.training.rounds import Rounds
from experiments.training.trainer import Trainer
from snella_jax import Reallocation

(ACCURACY,) = Classification().metrics
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def stopped(monkeypatch, words, number, at):
    """Runs; the signal comes while a step begins, the last of so many."""
    inner, count = Trainer._take, [0]

    def take(*given):
        inner(*given)
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_take", take)
        with pytest.raises(SystemExit) as end:
            vtab.main(words)
    assert end.value.code == 75 and count[0] == at
    return str(end.value)


def weights(out):
    manager = Checkpoints(out / "checkpoints" / "snella", ACCURACY).manager
    found = manager.restore(manager.latest_step())
    manager.close()
    return found["state"]


def test_a_run_that_is_told_to_stop_goes_on_at_its_step(tmp_path, monkeypatch, capsys):
    """Twice within one epoch, after its budgets moved; then at an epoch's last step."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # 16 images in batches of 4.
    own = ["--epochs=3", "--methods", "snella"]
    words = pictures.short(tmp_path, *own, each=8)
    vtab.main([*words, f"--out={whole}"])
    before, resume = handlers(), ["--resume", str(broken)]
    said = stopped(monkeypatch, [*words, f"--out={broken}"], signal.SIGTERM, at=6)
    assert said == "Stopped as it was told to, 2 steps into epoch 2."
    assert f"Go on with it by --resume {broken}" in " ".join(
        capsys.readouterr().out.split()
    )
    midst = broken / "checkpoints/snella/interrupted"
    assert [path.name for path in midst.iterdir()] == ["6"]
    stopped(monkeypatch, resume, signal.SIGUSR2, at=1)
    assert [path.name for path in midst.iterdir()] == ["7"]
    said = stopped(monkeypatch, resume, signal.SIGTERM, at=1)
    assert "0 steps into epoch 3" in said and not midst.exists()
    summary = vtab.main(resume)
    assert handlers() == before
    rows = [metric_log.of(out, "snella") for out in (whole, broken)]
    for row in (*rows[0], *rows[1]):
        row.pop("seconds_per_step")
    assert rows[0] == rows[1] and [row["moves"] for row in rows[0][1:]] == [1, 1]
    for one, other in zip(
        *(jax.tree.leaves(weights(out)) for out in (whole, broken)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert summary["methods"]["snella"]["val_accuracy"] is not None


def test_a_signal_outside_of_training_is_an_exit():
    before = handlers()
    said = pytest.raises(stopping.Stopped, match=r"Stopped by SIGUSR2\.")
    with said as end, stopping.at_once():
        os.kill(os.getpid(), signal.SIGUSR2)
        raise AssertionError("it went on")
    assert end.value.code == 75 and handlers() == before


def test_a_wish_that_was_not_granted_is_at_the_end():
    said = pytest.raises(stopping.Stopped, match="by SIGTERM, after the last step")
    with said, stopping.deferred() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()


def test_other_threads_leave_the_handlers_alone():
    before, seen = handlers(), []

    def train():
        with stopping.deferred():
            seen.append(handlers())

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.slow  # two processes that compile by themselves
def test_two_processes_stop_before_the_same_step(tmp_path):
    """One is told to, by USR2; together they go on as if none was."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    program = str(ROOT / "tests/helpers/stopped_pair.py")
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    own = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(flags)}
    pair = [
        subprocess.Popen(
            [sys.executable, program, str(tmp_path), address, str(number)],
            env=os.environ | own,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        for number in (0, 1)
    ]
    found = [json.loads(one.communicate()[0].splitlines()[-1]) for one in pair]
    assert [one.returncode for one in pair] == [0, 0]
    assert found[0] == found[1]
    assert found[0]["status"] == 75
    assert found[0]["said"].startswith("Stopped as it was told to, ")
    (losses, digest), (all_losses, whole) = found[0]["stopped"], found[0]["whole"]
    assert digest == whole
    assert losses == all_losses[len(all_losses) - len(losses) :] and losses


def test_moves_of_a_round_are_taken_up():
    """Those that wait until the ranking of scores has settled compare with it."""
    rules = Competition(lambda **_: lambda passed: 1, every="settled")
    one, other = (rules.begin(1, Rounds(main=10, size=5)) for _ in range(2))
    other.take_up(json.loads(json.dumps(one.as_json())))
    assert (other.count, other.seen, other.last) == (0, None, None)
    one.count, one.seen = 2, {"a": np.array(0.1), "b": np.array([1 / 3, 2.0])}
    text = (("a", "b"), ("b",))
    one.last = Reallocation(3, 2, text[0], *map(np.array, ([0.1], [1], [2])), text[1])
    other.take_up(json.loads(json.dumps(one.as_json())))
    assert other.count == 2 and (other.last.names, other.last.died) == text
    assert (other.last.step, other.last.steps_since) == (3, 2)
    for path, own in one.seen.items():
        np.testing.assert_array_equal(other.seen[path], own, strict=True)
    for name in ("scores", "budgets", "capacities"):
        found, own = (getattr(moves.last, name) for moves in (other, one))
        np.testing.assert_array_equal(found, own, strict=True)
