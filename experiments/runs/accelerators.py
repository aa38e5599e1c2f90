"""Accelerators of this machine, of which each worker gets one."""

import glob
import os
import shutil
import subprocess

CPU = "cpu"


def of_workers(count: int) -> list[dict[str, str]]:
    """Returns the environment of each of some workers on this machine.

    On a machine with GPUs or TPU chips each worker sees one of them, and no other
    worker does; on CPUs the environment is empty. Devices stay untouched: a program
    that opens one has it for itself.

    Raises:
      ValueError: there are fewer accelerators than workers.
    """
    if os.environ.get("JAX_PLATFORMS") == CPU:
        return [{} for _ in range(count)]
    gpus, chips = _gpus(), _chips()
    found = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [
        {
            "TPU_VISIBLE_CHIPS": chip,
            "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
            "TPU_PROCESS_BOUNDS": "1,1,1",
        }
        for chip in chips
    ]
    if found and len(found) < count:
        raise ValueError(
            f"workers={count}: expected at most {len(found)}, one for each "
            "accelerator. (JAX_PLATFORMS=cpu takes none.)"
        )
    return found[:count] or [{} for _ in range(count)]


def _gpus() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, encoding="utf-8")
    return found.stdout.split() if found.returncode == 0 else []


def _chips() -> list[str]:
    """Returns the numbers of the TPU chips."""
    paths = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return [str(number) for number in range(len(paths))]
