"""Bytes that a compiled program allocates, as its compiler says."""

import re
from typing import Any

import jax

GIB = 2**30
# What the TPU's compiler says of a program that is too large.
TOO_LARGE = re.compile(r"RESOURCE_EXHAUSTED: .*\((\d+\.\d+)G\) exceeds available HBM")


def compiled(lowered: jax.stages.Lowered) -> tuple[dict[str, Any], Any]:
    """Compiles a program; returns the bytes of one device, and the program.

    Returns:
      `total_bytes`, and of it `argument_bytes`, `temporary_bytes` and `result_bytes`;
      where the compiler refuses, the total and `fits`, False, and None.
    """
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = TOO_LARGE.search(str(error))
        if needed is None:
            raise
        return {"total_bytes": round(float(needed[1]) * GIB), "fits": False}, None
    parts: Any = program.memory_analysis()
    found = {
        "argument_bytes": parts.argument_size_in_bytes,
        "temporary_bytes": parts.temp_size_in_bytes,
        "result_bytes": parts.output_size_in_bytes - parts.alias_size_in_bytes,
    }
    return {"total_bytes": sum(found.values())} | found, program
