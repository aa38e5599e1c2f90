"""Targets to compile for, present or not.

A TPU's compiler is the `libtpu` wheel, an NVIDIA GPU's is in `jax[cuda12]`; both
compile without the device: `pip install -e ".[experiments,tpu,cuda]"`.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from experiments import hardware

Target = Literal["local", "tpu-v5e", "h100"]

# What the compilers want to know of the host and the device, read when they start.
ENVIRONMENT = {
    "tpu-v5e": {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    },
    "h100": {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0",
    },
}
PACKAGES = {"tpu-v5e": ("libtpu", "tpu"), "h100": ("jax_plugins.xla_cuda12", "cuda")}
H100 = Path(__file__).with_name("h100.textproto")
# By number of chips: a v5e slice's shape, and processes x hosts x GPUs of a host.
TOPOLOGIES = {
    "tpu-v5e": {1: "v5e:2x2", 4: "v5e:2x2", 16: "v5e:4x4"},
    "h100": {1: "1x1x1", 4: "1x1x4", 16: "1x2x8"},
}
GIB = 2**30
CAPACITY = {"tpu-v5e": 16 * GIB, "h100": 84_942_979_072}  # bytes of a chip


def sharding(target: Target) -> SingleDeviceSharding:
    """Returns one device of the target, to lower and compile for; as `devices`."""
    return SingleDeviceSharding(devices(target)[0])


def devices(target: Target, chips: int = 1) -> list[Any]:
    """Returns chips of the target, to lower and compile for.

    Call it before anything runs on JAX: the host then stays on the CPU, and the
    target's compiler reads its environment.

    Raises:
      ModuleNotFoundError: the target's compiler is not installed; says how to install
        it.
      ValueError: more chips than there are here, or a number of them that the target
        is not described for.
    """
    if target == "local":
        found = jax.devices()
        if chips > len(found):
            raise ValueError(f"chips={chips}: there are {len(found)} devices here.")
        return found[:chips]
    known = TOPOLOGIES[target]
    if chips not in known:
        raise ValueError(
            f"chips={chips}: expected {', '.join(map(str, known))} for {target}."
        )
    module, extra = PACKAGES[target]
    if not _installed(module):
        raise ModuleNotFoundError(
            f"The compiler for {target} is not installed: run "
            f'pip install -e ".[experiments,{extra}]" in the clone.'
        )
    jax.config.update("jax_platforms", "cpu")
    for name, value in ENVIRONMENT[target].items():
        own = os.environ.get(name, "") if name == "XLA_FLAGS" else ""
        os.environ[name] = f"{own} {value}".strip()
    shape = known[chips]
    if target == "tpu-v5e":
        topology = topologies.get_topology_desc(shape, "tpu")
    else:
        topology = topologies.get_topology_desc(
            "h100", "cuda", target_config=H100.read_text("utf-8"), topology=shape
        )
    return list(topology.devices)[:chips]


def describe(target: Target) -> str:
    """Returns the device's name for results."""
    if target == "local":
        return hardware.describe()
    return f"{target}, compiled without the device"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
