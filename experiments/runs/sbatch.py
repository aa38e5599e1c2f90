"""Scripts of SLURM for workers: plain text, and what submitit needs to write the same.

A worker gets SIGTERM two minutes before its time is over, saves and exits with 75; the
script has it queued again.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.config.cluster import Cluster
from experiments.runs.cells import LAUNCH, WORKER
from experiments.training.stopping import STATUS

GPUS = "gpus-per-node"
AGAIN = [
    "status=$?",
    f'if [ "$status" -eq {STATUS} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
    'exit "$status"',
]


def options(cluster: Cluster, name: str) -> dict[str, str | bool]:
    """Returns the options of sbatch but the array's, by name; True for a flag."""
    minutes = max(1, round(60 * cluster.hours))
    usual: dict[str, str | bool] = {
        "job-name": name,
        "nodes": "1",
        "ntasks-per-node": "1",
        GPUS: "1",
        "time": str(minutes),
        "signal": "TERM@120",
        "requeue": True,
        "open-mode": "append",
    }
    found = usual | cluster.sbatch_options
    if found[GPUS] == "0":
        del found[GPUS]
    return found


def script(
    cluster: Cluster,
    command: Sequence[str],
    logs: Path,
    environment: Mapping[str, str],
    here: Path,
) -> str:
    """Returns the script of an array of workers.

    Args:
      command: what each of them runs, as `python -m experiments.compare ...`.
      logs: folder of their output.
      environment: variables that they have.
      here: folder in which they run.
    """
    name = command[2].rpartition(".")[2]
    own = options(cluster, name)
    own |= {"array": f"0-{cluster.workers - 1}", "output": f"{logs}/%A_%a.log"}
    lines = ["#!/bin/bash"]
    for flag, value in own.items():
        text = "" if value is True else f"={shlex.quote(str(value))}"
        lines.append(f"#SBATCH --{flag}{text}")
    exported = [f"export {n}={shlex.quote(value)}" for n, value in environment.items()]
    ids = f"export {LAUNCH}=$SLURM_ARRAY_JOB_ID {WORKER}=$SLURM_ARRAY_TASK_ID"
    lines += [f"cd {shlex.quote(str(here))}", *exported, ids, ""]
    return "\n".join([*lines, f"srun {shlex.join(command)}", *AGAIN, ""])
