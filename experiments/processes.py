"""Processes of one run on several devices or hosts, each started with its command."""

import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence

import jax

# Seconds after which processes end that wait for one that has stopped. JAX's own are
# 100 and 300.
HEARTBEAT = SHUTDOWN = 30
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def join() -> None:
    """Finds the other processes, before any device is used, and says what this one has.

    JAX knows TPU pods, SLURM, Open MPI and Kubernetes; elsewhere
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say where they
    are.

    Raises:
      ValueError: the GPUs of a SLURM node cannot be divided among its tasks.
    """
    own = local_devices(os.environ)
    count, number = map(os.environ.get, ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    jax.distributed.initialize(
        num_processes=int(count) if count else None,
        process_id=int(number) if number else None,
        local_device_ids=own,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )
    print(describe(own), file=sys.stderr, flush=True)


def describe(own: Sequence[int] | None = None) -> str:
    """Returns what this process sees of the devices.

    Args:
      own: `local_device_ids` that it was given, or None.
    """
    devices = jax.local_devices()
    kind = devices[0].device_kind
    given = "" if own is None else f", local_device_ids={','.join(map(str, own))}"
    number, count = jax.process_index() + 1, jax.process_count()
    return (
        f"process {number} of {count} on {socket.gethostname()}: {len(devices)} x "
        f"{kind} of {jax.device_count()}{given}"
    )


def local_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Returns which of the GPUs that a SLURM task sees are its own; None for JAX's way.

    JAX takes one, of the number of the task on its node. That is one of several where a
    node has one task, and none where a task sees its own alone (`--gpus-per-task`).

    >>> task = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    >>> local_devices(task | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    [0, 1, 2, 3]

    Raises:
      ValueError: the GPUs cannot be divided among the tasks of the node.
    """
    known = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_LOCALID")
    seen = next((environment[name] for name in VISIBLE if environment.get(name)), "")
    if "JAX_LOCAL_DEVICE_IDS" in environment or not seen:
        return None
    if not all(name in environment for name in known):
        return None
    gpus, tasks = len(seen.split(",")), _tasks_here(environment)
    bound = environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]
    if tasks == 1 or bound == str(gpus) or gpus == 1:
        return list(range(gpus))  # each task sees its own alone
    if gpus % tasks:
        raise ValueError(
            f"{gpus} GPUs for {tasks} tasks of a node: expected as many for each. "
            "sbatch --ntasks-per-node=N, N the GPUs of a node, gives each one."
        )
    each, place = gpus // tasks, int(environment["SLURM_LOCALID"])
    return list(range(place * each, (place + 1) * each))


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Returns how many tasks the step has on this node, of `2(x3),1`."""
    counts: list[int] = []
    words = environment.get(
        "SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "1")
    )
    for word in words.split(","):
        tasks, _, nodes = word.partition("(x")
        counts += [int(tasks)] * int(re.sub(r"\D", "", nodes) or 1)
    return counts[min(int(environment.get("SLURM_NODEID", 0)), len(counts) - 1)]
