"""Which GPUs a task of SLURM takes, and what a process says of its devices."""

import jax
import pytest

from experiments import processes

TASK = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    "environment, own",
    {
        "no SLURM": ({"CUDA_VISIBLE_DEVICES": "0,1"}, None),
        "no GPUs": (TASK, None),
        "told by hand": (
            TASK | {"CUDA_VISIBLE_DEVICES": "0", "JAX_LOCAL_DEVICE_IDS": "0"},
            None,
        ),
        "one task of a node with four": (
            {**TASK, "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "1(x4)"}
            | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"},
            [0, 1, 2, 3],
        ),
        "a part of a node, in SLURM's numbers": (
            {**TASK, "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "1(x4)"}
            | {"CUDA_VISIBLE_DEVICES": "5,7"},
            [0, 1],
        ),
        "a task for each GPU": (
            {**TASK, "SLURM_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "0,1"},
            [1],
        ),
        "two for each task": (
            {**TASK, "SLURM_TASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
            [2, 3],
        ),
        "--gpus-per-task, bound": (
            {**TASK, "SLURM_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "3"},
            [0],
        ),
        "--gpus-per-task=a100:2, bound": (
            {**TASK, "SLURM_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "2,3"}
            | {"SLURM_GPUS_PER_TASK": "a100:2"},
            [0, 1],
        ),
        "the second node has fewer tasks": (
            {**TASK, "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
            | {"SLURM_TASKS_PER_NODE": "3,1", "ROCR_VISIBLE_DEVICES": "0,1,2"},
            [0, 1, 2],
        ),
    }.values(),
)
def test_which_devices_a_task_of_slurm_takes(environment, own):
    assert processes.local_devices(environment) == own


def test_gpus_that_cannot_be_divided():
    environment = TASK | {"SLURM_TASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1,2"}
    with pytest.raises(ValueError, match="3 GPUs for 2 tasks of a node"):
        processes.local_devices(environment)


def test_every_process_joins_with_short_timeouts_and_says_what_it_sees(
    monkeypatch, capsys
):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **own: given.update(own))
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    processes.join()
    assert (given["num_processes"], given["process_id"]) == (2, 1)
    limits = given["heartbeat_timeout_seconds"], given["shutdown_timeout_seconds"]
    assert limits == (30, 30)
    said = capsys.readouterr().err
    assert said.startswith("process 1 of 1 on ") and said.endswith(": 4 x cpu of 4\n")
