"""Workers: their options and scripts, what they share, and one that is killed twice."""

import contextlib
import dataclasses
import gc
import importlib.util
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pictures
import pytest
import submitit
from places import ROOT

from experiments import vtab
from experiments.config import command_line, run_config
from experiments.config.cluster import Cluster
from experiments.config.images import ImageConfig
from experiments.runs import accelerators, board, cells, cluster, sbatch, suite
from experiments.runs.cells import Cell
from experiments.training import metric_log

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=compare
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --time=90
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --partition=gpu
#SBATCH --array=0-3
#SBATCH --output=out/workers/%A_%a.log
cd '/home/me/my code'
export JAX_COMPILATION_CACHE_DIR=out/workers/compiled
export SNELLA_LAUNCH=$SLURM_ARRAY_JOB_ID SNELLA_WORKER=$SLURM_ARRAY_TASK_ID

srun python -m experiments.compare --tasks 'my pets' --out out
status=$?
if [ "$status" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
"""
FOUR = Cluster(cluster="slurm", workers=4, hours=1.5, sbatch=("partition=gpu",))


def test_the_script_of_an_array():
    words = ["--tasks", "my pets", "--out", "out"]
    made = sbatch.script(
        FOUR,
        ["python", "-m", "experiments.compare", *words],
        Path("out/workers"),
        {cluster.CACHE: "out/workers/compiled"},
        Path("/home/me/my code"),
    )
    assert made == SCRIPT
    none = dataclasses.replace(FOUR, sbatch=("gpus_per_node=0", "time=2:00:00"))
    found = sbatch.options(none, "compare")
    assert "gpus-per-node" not in found and found["time"] == "2:00:00"


def test_submitit_writes_the_same_options(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv(cluster.CACHE, "out/workers/compiled")
    work = cluster.Work("python -m experiments.compare", [], tmp_path, [], bool, str)
    executor = submitit.AutoExecutor(tmp_path, cluster="slurm")
    executor.update_parameters(**cluster._slurm(FOUR, work))
    text = executor._executor._make_submission_file_text("command", "uid")
    lines = text.splitlines()
    own = {
        line
        for line in SCRIPT.splitlines()
        if line.startswith("#SBATCH") and "array" not in line and "output" not in line
    }
    assert own <= set(lines) and "exclusive" not in text
    assert f"export {cluster.CACHE}=out/workers/compiled" in lines
    said = [line for line in lines if line and not line.startswith("#")]
    assert "command" in said[-4] and said[-3:] == sbatch.AGAIN


@pytest.mark.parametrize("words, message", [
    (["--workers=2"], "are options of --cluster"),
    (["--cluster=local", "--workers=0"], "workers=0, hours=24"),
    (["--cluster=local", "--sbatch", "a=b"], "are options of SLURM"),
    (["--cluster=slurm", "--sbatch", "gpu"], "sbatch=gpu: expected NAME=VALUE"),
    (["--cluster=local", "--print_sbatch"], "a script of SLURM, not local's"),
])  # fmt: skip
def test_wrong_options_are_named(words, message):
    with pytest.raises(SystemExit, match=message):
        command_line.spread("here", words)


def test_workers_get_the_other_words():
    words = ["--tasks", "a", "b", "--cluster=slurm", "--workers", "4", "--hours=1.5"]
    found = command_line.spread("here", [*words, "--sbatch", "partition=gpu", "--x=1"])
    assert found == (FOUR, ["--tasks", "a", "b", "--x=1"])
    asked = ["--help", "lora", "--workers=3"]
    assert command_line.spread("here", asked) == (Cluster(), asked)


def test_submitit_is_needed_for_workers_alone(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="extra `cluster`"):
        cluster.prepare(Cluster(cluster="debug"))
    for own in (Cluster(), Cluster(print_sbatch=True)):
        cluster.prepare(own)


def test_each_worker_sees_one_accelerator(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert accelerators.of_workers(3) == [{}] * 3
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    own = [{"CUDA_VISIBLE_DEVICES": name} for name in "35"]
    assert accelerators.of_workers(2) == own
    with pytest.raises(ValueError, match="workers=3: expected at most 2, one for each"):
        accelerators.of_workers(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(accelerators, "_chips", lambda: ["0", "1", "2", "3"])
    found = [own["TPU_VISIBLE_CHIPS"] for own in accelerators.of_workers(4)]
    assert found == ["0", "1", "2", "3"]


def test_the_table_of_cells(tmp_path):
    own = [Cell(name, tmp_path / name) for name in "abcde"]
    notes = {
        "b": {"worker": "1", "since": time.time() - 90},
        "c": {"worker": "dead", "since": 0},
        "d": {"worker": "2", "failed": "the loss is nan"},
    }
    for name, note in notes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / cells.NOTE).write_text(json.dumps(note), "utf-8")
    found = board.states(own, lambda cell: cell.name == "a", {"1", "2"})
    assert [state.kind for state in found] == [
        *("done", "running", "left", "failed", "left")
    ]
    made = board.table(found)
    assert board.brief(found) == "5 cells: 1 done, 1 running, 1 failed, 2 left"
    texts = [[str(cell) for cell in column.cells] for column in made.columns]
    assert texts == [
        ["b", "d"],
        ["running", "failed"],
        ["worker 1, for 2 min", "the loss is nan"],
    ]


# Debug workers of submitit leave their logs open.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_workers_share_the_methods_of_a_task(tmp_path, monkeypatch, capsys):
    """In this process; the second command finds one left, and the third none."""
    done, failing = [], True

    def run(prepared, resume):
        done.append((prepared.config.methods, prepared.out.name, resume))
        prepared.out.mkdir(exist_ok=True)
        if failing and prepared.config.methods == ("bias",):
            raise suite.RunFailed("the loss is nan")
        (prepared.out / "summary.json").write_text("{}", "utf-8")

    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setattr(suite.table, "write", lambda *_: None)
    monkeypatch.setattr(suite.table, "table", lambda _: None)
    monkeypatch.setattr(suite.finished, "collect", lambda *_: [])
    monkeypatch.delenv("JAX_PLATFORMS")  # jax has read it
    out = tmp_path / "out"
    words = pictures.short(tmp_path, "--methods", "lora", "bias", f"--out={out}")
    with pytest.raises(SystemExit) as failed:
        vtab.main([*words, "--cluster=debug", "--workers=2"])
    assert "bias: the loss is nan" in str(failed.value)
    assert f"Go on with them by --resume {out}" in str(failed.value)
    assert done == [(("lora",), "lora", False), (("bias",), "bias", False)]
    assert "2 cells: 1 done, 0 running, 1 failed, 0 left" in capsys.readouterr().out
    failing = False
    for _ in range(2):
        vtab.main(["--resume", str(out), "--cluster=debug"])
    assert done[2:] == [(("bias",), "bias", False)]
    with pytest.raises(SystemExit, match="0"):
        vtab.main(["--resume", str(out), "--print_sbatch"])
    assert f"-m experiments.vtab --resume {out}\n" in capsys.readouterr().out
    gc.collect()


@pytest.mark.parametrize("words, message", [
    (["--distributed", "--out=there"], "expected one of the two"),
    (["--resume=one"], "one is a run of one process, expected a suite"),
])  # fmt: skip
def test_workers_are_for_several_runs(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one").mkdir()
    Path("one/config.json").write_text("{}", "utf-8")
    if "--resume" not in words[0]:
        words = ["--config=quickstart", *words]
    with pytest.raises(SystemExit, match=message):
        vtab.main([*words, "--cluster=debug"])


# Three workers on this machine

TASKS = [f"t{number}" for number in range(12)]


def begun(root):
    """Begins a suite of twelve tasks, of more and more images."""
    tasks = {}
    for number, name in enumerate(TASKS):
        pictures.draw(root / name, each=4, train=8 + number)
        own = ["--epochs=5", "--methods", "bias", f"--task={root / name}"]
        words = pictures.short(root, *own)
        _, config = command_line.parse("here", vtab.presets.VTAB, words)
        tasks[name] = run_config.as_dict(config)
    program = "python -m experiments.vtab"
    (root / "out").mkdir()
    found = {"program": program, "tasks": tasks}
    (root / "out" / suite.FILE).write_text(json.dumps(found), "utf-8")
    return tasks


def kill_inside(out, again):
    """SIGKILLs a worker behind the third epoch of a cell; returns the cell.

    Args:
      again: text in the worker's name.
    """
    deadline = time.monotonic() + 3000
    while time.monotonic() < deadline:
        time.sleep(0.01)
        for name in TASKS:
            note = Cell(name, out / name).note() or {}
            log = out / name / metric_log.NAME
            if again not in note.get("worker", "") or not log.exists():
                continue
            if log.read_text("utf-8").count("\n") in (3, 4):
                os.kill(note["pid"], signal.SIGKILL)
                time.sleep(0.1)
                if not (out / name / "summary.json").exists():
                    return name
    raise TimeoutError("no worker was inside a cell")


@pytest.mark.slow  # six processes that compile by themselves
def test_a_worker_that_is_killed_twice_loses_no_cell(tmp_path, monkeypatch):
    tasks, out, killed = begun(tmp_path), tmp_path / "out", []
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def kill():
        with contextlib.suppress(TimeoutError):
            killed.append(kill_inside(out, ""))
            killed.append(kill_inside(out, "again"))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    vtab.main(["--resume", str(out), "--cluster=local", "--workers=3"])
    killer.join(1)
    assert len(killed) == 2
    logs = "".join(log.read_text("utf-8") for log in out.glob("workers/*_log.out"))
    said = [line for line in logs.splitlines() if line.startswith("Everything is in")]
    assert sorted(said) == sorted(f"Everything is in {out / n}" for n in TASKS)
    # What was killed behind its third epoch went on from its first or a later one.
    assert logs.count("epoch 1/5") == 12
    for name in {*killed, TASKS[-1]}:  # the last comes after others in its process
        values = tasks[name]
        alone, own = tmp_path / "alone" / name, out / name
        default = ImageConfig()
        where = tmp_path / "config.json"
        config = command_line.from_values("here", values, default, where)
        where.write_text(json.dumps(run_config.as_dict(config)), "utf-8")
        vtab.main([f"--config={where}", f"--out={alone}"])
        results = [
            json.loads((p / "results.json").read_text("utf-8")) for p in (alone, own)
        ]
        for found in results:
            found["bias"].pop("seconds_per_step")
        assert results[0] == results[1]
        rows = [metric_log.of(place, "bias") for place in (alone, own)]
        for row in (*rows[0], *rows[1]):
            row.pop("seconds_per_step")
        assert rows[0] == rows[1] and len(rows[0]) == 5
