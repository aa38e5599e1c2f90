"""Bytes that a compiled program allocates, as its compiler says."""

import re
from typing import Any

import jax

GIB = 2**30
UNITS = {"K": 2**10, "M": 2**20, "G": GIB}
# What the TPU's compiler says of a program that is too large, before and after it has
# laid its arrays out.
TOO_LARGE = re.compile(
    r"RESOURCE_EXHAUSTED: .*(?:\((\d+\.\d+)([KMG])\) exceeds available HBM"
    r"|Used (\d+\.\d+)([KMG]) of [\d.]+[KMG] hbm)"
)


def compiled(
    lowered: jax.stages.Lowered, hbm: float | None = None
) -> tuple[dict[str, Any], Any]:
    """Compiles a program; returns the bytes of one device, and the program.

    Args:
      lowered: the program.
      hbm: GiB that a TPU's compiler may use; None for all that the chip has.

    Returns:
      `total_bytes`, and of it `argument_bytes`, `temporary_bytes` and `result_bytes`;
      where the compiler refuses, the total and `fits`, False, and None.
    """
    options: Any = (
        None if hbm is None else {"xla_tpu_max_hbm_size_mib": round(hbm * 1024)}
    )
    try:
        program = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        needed = TOO_LARGE.search(str(error))
        if needed is None:
            raise
        size, unit = (group for group in needed.groups() if group is not None)
        return {"total_bytes": round(float(size) * UNITS[unit]), "fits": False}, None
    parts: Any = program.memory_analysis()
    found = {
        "argument_bytes": parts.argument_size_in_bytes,
        "temporary_bytes": parts.temp_size_in_bytes,
        "result_bytes": parts.output_size_in_bytes - parts.alias_size_in_bytes,
    }
    return {"total_bytes": sum(found.values())} | found, program
