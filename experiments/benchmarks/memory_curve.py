r"""Follows memory through one training step: the paper's Figure 7(b).

    python -m experiments.benchmarks.memory_curve --model vit_b16 --batch 8 --no-stacked

compiles the step of each method for an H100, which need not be present, and adds up
what lives at each instruction of the compiled program (see `liveness`). Its highest
point is printed beside the bytes that the compiler says it allocates. Writes
`memory_curve.json` and `memory_curve.png` into `--out`. The axis of the picture is the
order of the instructions, not time.

With --no-stacked blocks are a list, and memory grows block by block; scanned blocks
write into arrays that are allocated for all of them before the first one.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import SingleDeviceSharding
from rich.progress import track
from rich.table import Table

from experiments import terminal
from experiments.benchmarks import allocation, figures, liveness, targets, workload
from experiments.benchmarks.allocation import GIB
from experiments.paths import Given, check_out
from experiments.reports import result_files

PROGRAM = "python -m experiments.benchmarks.memory_curve"
POINTS = 400  # of a curve: each is the highest of its part of the schedule


@dataclasses.dataclass(frozen=True)
class CurveConfig(workload.Options):
    """Options of `python -m experiments.benchmarks.memory_curve`."""

    method: tuple[str, ...] = ("full", "snella", "snella_stored")
    """Methods to compare. snella_stored: without the recompute."""
    model: str = "vit_b16"
    """Preset of snella_jax.models."""
    target: Literal["h100", "local"] = "h100"
    """Device that the step is compiled for."""
    out: Given = Path("runs/memory_curve")
    """Folder to write memory_curve.json and memory_curve.png into."""


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Compiles, and returns the rows of `memory_curve.json`."""
    config = tyro.cli(CurveConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        settings = config.settings(config.model)
        where = targets.sharding(config.target)
    console = terminal.console()
    rows = [
        _row(setting, config.target, where)
        for setting in track(settings, "compiling", console=console)
    ]
    result_files.write(
        config.out, "memory_curve", rows, console, figures.memory_curve, _table(rows)
    )
    return rows


def _row(
    setting: workload.Setting, target: targets.Target, where: SingleDeviceSharding
) -> dict[str, Any]:
    one = workload.abstract(setting)
    compiler = jax.jit(
        one.run, donate_argnums=one.donated, in_shardings=where, out_shardings=where
    )
    found, program = allocation.compiled(compiler.lower(*one.arguments))
    if program is None:
        raise RuntimeError(f"{setting.method} on {setting.model} does not fit {target}")
    sizes = liveness.live_bytes(program.as_text() or "")
    return {
        **dataclasses.asdict(setting),
        **summary(sizes),
        "compiler_bytes": found["total_bytes"],
        "argument_bytes": found["argument_bytes"],
        "target": target,
        "device": targets.describe(target),
        "jax": jax.__version__,
    }


def summary(sizes: list[int], points: int = POINTS) -> dict[str, Any]:
    """Returns what is kept of the live bytes of a schedule.

    Returns:
      `instructions`, their number; `peak_bytes`; `peak_at`, the share of the schedule
      before the first instruction that takes as much; `curve`, the highest bytes in
      each of `points` equal parts of the schedule.
    """
    count, peak = len(sizes), max(sizes)
    edges = np.linspace(0, count, min(points, count) + 1).astype(int)
    return {
        "instructions": count,
        "peak_bytes": peak,
        "peak_at": round(sizes.index(peak) / count, 4),
        "curve": [max(sizes[a:b]) for a, b in itertools.pairwise(edges)],
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    blocks = "scanned" if first["stacked"] else "a list"
    table = Table(
        title=f"GiB through one step, {first['model']}, batch {first['batch']}, "
        f"{first['dtype']}, blocks {blocks}: {first['device']}"
    )
    names = ("method", "arguments", "peak", "at", "compiler", "difference")
    for name in names:
        table.add_column(name, justify="left" if name == "method" else "right")
    for r in rows:
        gib = [r[f"{part}_bytes"] / GIB for part in ("argument", "peak", "compiler")]
        table.add_row(
            figures.label(r),
            f"{gib[0]:.3f}",
            f"{gib[1]:.3f}",
            f"{r['peak_at']:.0%}",
            f"{gib[2]:.3f}",
            f"{gib[1] / gib[2] - 1:+.1%}",
        )
    return table


if __name__ == "__main__":
    main()
