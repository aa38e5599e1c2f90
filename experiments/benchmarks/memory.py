r"""Measures the compiled peak memory of one training step, method by method.

    python -m experiments.benchmarks.memory --target h100 --batch 8 \
        --model vit_b16 vit_l16 vit_h14

compiles the step of every method for the target, which need not be present, and asks
the compiler how much it will allocate for arguments, results and temporaries. Prints a
table and writes `memory.json` and `memory.png` (memory against the size of the model,
as in the paper's Figure 7(b, c) and Table XVI) into `--out`. Full fine-tuning keeps its
weights in float32, as it has to; LoRA's cast of a frozen weight is recomputed, so that
no copy of it counts against LoRA. The total of SPT, GPS and NOAH is that of their first
stage where it takes more (`locating_bytes`).
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.progress import track
from rich.table import Table

from experiments import terminal
from experiments.benchmarks import figures, targets, workload
from experiments.paths import Given, check_out
from experiments.reports import result_files

PROGRAM = "python -m experiments.benchmarks.memory"
GIB = 2**30
PARTS = ("total", "argument", "temporary", "locating")


@dataclasses.dataclass(frozen=True)
class MemoryConfig(workload.Options):
    """Options of `python -m experiments.benchmarks.memory`."""

    target: targets.Target = "local"
    """Device that the step is compiled for. On the CPU, XLA's scheduler does not save
    memory: its figures rank methods badly."""
    model: tuple[str, ...] = ("vit_b16",)
    """Presets of snella_jax.models."""
    out: Given = Path("runs/memory")
    """Folder to write memory.json and memory.png into."""


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Compiles, and returns the rows of `memory.json`."""
    config = tyro.cli(MemoryConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        if not config.model:
            raise ValueError("--model names nothing: expected at least one.")
        settings = [each for name in config.model for each in config.settings(name)]
        where = targets.sharding(config.target)
    console = terminal.console()
    rows = [
        row(setting, config.target, where)
        for setting in track(settings, "compiling", console=console)
    ]
    result_files.write(
        config.out, "memory", rows, console, figures.memory, _table(rows)
    )
    return rows


def row(
    setting: workload.Setting, target: targets.Target, where: Any
) -> dict[str, Any]:
    """Compiles one step for the device of `where`; returns its row of `memory.json`."""
    one, first = workload.abstract(setting), workload.locating(setting)
    start = time.perf_counter()
    found = _allocated(one, where)
    seconds = time.perf_counter() - start
    found["locating_bytes"] = _allocated(first, where)["total_bytes"] if first else 0
    found["total_bytes"] = max(found["total_bytes"], found["locating_bytes"])
    return {
        "method": setting.method,
        "model": setting.model,
        "batch": setting.batch,
        "target": target,
        "frozen_dtype": setting.frozen_dtype,
        "path": setting.path,
        **found,
        "dtype": setting.dtype,
        "rank": setting.rank,
        "stacked": one.stacked,
        "remat": setting.remat,
        "attention": setting.attention,
        "parameters": workload.parameters(setting.model),
        "trainable": workload.size(one.arguments[0]),
        "compile_seconds": round(seconds, 1),
        "device": targets.describe(target),
        "jax": jax.__version__,
    }


def _allocated(one: workload.Step, where: Any) -> dict[str, int]:
    """Returns the bytes that a compiled step allocates, in all and by part."""
    compiler = jax.jit(
        one.run, donate_argnums=one.donated, in_shardings=where, out_shardings=where
    )
    parts: Any = compiler.lower(*one.arguments).compile().memory_analysis()
    found = {
        "argument_bytes": parts.argument_size_in_bytes,
        "temporary_bytes": parts.temp_size_in_bytes,
        "result_bytes": parts.output_size_in_bytes - parts.alias_size_in_bytes,
    }
    return {"total_bytes": sum(found.values())} | found


def _table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    table = Table(
        title=f"GiB in one step, batch {first['batch']}, {first['dtype']}, frozen "
        f"{first['frozen_dtype']}: {first['device']}"
    )
    names = ("model", "method", "total", "arguments", "temporary", "locating", "/lora")
    for name in (*names, "/full", "compile"):
        left = name in names[:2]
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    totals = {(r["model"], r["method"]): r["total_bytes"] for r in rows}
    for r in rows:
        ratios = [
            f"{r['total_bytes'] / totals[r['model'], other]:.3f}"
            if (r["model"], other) in totals
            else ""
            for other in ("lora", "full")
        ]
        parts = [f"{r[f'{k}_bytes'] / GIB:.2f}" for k in PARTS]
        seconds = f"{r['compile_seconds']:.1f} s"
        table.add_row(r["model"], r["method"], *parts, *ratios, seconds)
    return table


if __name__ == "__main__":
    main()
