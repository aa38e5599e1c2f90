r"""Measures seconds per training step, method by method, on the local device.

    python -m experiments.benchmarks.throughput --model vit_b16 --batch 8 \
        --dtype float32

Every method's step is compiled and run once. Then all of them take turns, so that a
slow minute of the machine affects each, and figures are medians and paired ratios (as
in the paper's Table XV). Prints a table and writes `throughput.json` and
`throughput.png` into `--out`. `--peer torch` adds Hugging Face PEFT's LoRA on the same
ViT in PyTorch, which needs `pip install torch transformers peft`.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import terminal
from experiments.benchmarks import figures, targets, workload
from experiments.paths import Given, check_out
from experiments.reports import result_files

PROGRAM = "python -m experiments.benchmarks.throughput"


@dataclasses.dataclass(frozen=True)
class ThroughputConfig(workload.Options):
    """Options of `python -m experiments.benchmarks.throughput`."""

    dtype: workload.Dtype = "float32"
    """Dtype of the computation."""
    frozen_dtype: workload.Dtype = "float32"
    """Dtype of the weights that do not train."""
    model: str = "vit_b16"
    """Preset of snella_jax.models."""
    repetitions: int = 10
    """Number of times that each step is timed."""
    peer: Literal["none", "torch"] = "none"
    """torch: also time PEFT's LoRA in PyTorch."""
    out: Given = Path("runs/throughput")
    """Folder to write throughput.json and throughput.png into."""


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measures, and returns the rows of `throughput.json`."""
    config = tyro.cli(ThroughputConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        if config.repetitions < 1:
            raise ValueError(f"repetitions={config.repetitions}: expected at least 1.")
        settings = config.settings(config.model)
        peer = _torch_peer(settings[0]) if config.peer == "torch" else None
    console = terminal.console()
    runs: list[tuple[dict[str, Any], Callable[[], None]]] = [
        compiled(setting) for setting in track(settings, "compiling", console=console)
    ]
    if peer is not None:
        runs.append(peer)
    rows = _timed(runs, config.repetitions, console)
    draw = figures.throughput
    result_files.write(config.out, "throughput", rows, console, draw, _table(rows))
    return rows


def compiled(setting: workload.Setting) -> tuple[dict[str, Any], Callable[[], None]]:
    """Compiles a setting; returns its row, and a function that runs one step of it."""
    one = workload.build(setting)
    start = time.perf_counter()
    lowered = jax.jit(one.run, donate_argnums=one.donated).lower(*one.arguments)
    run = lowered.compile()
    seconds = time.perf_counter() - start
    arguments = list(one.arguments)

    def take() -> None:
        *arguments[:2], loss = run(*arguments)
        loss.block_until_ready()

    row = dataclasses.asdict(setting) | {
        "path": setting.path,
        "stacked": one.stacked,
        "attention": setting.attention,
        "compile_seconds": round(seconds, 1),
        "device": targets.describe("local"),
        "jax": jax.__version__,
    }
    return row, take


def _timed(runs: list, repetitions: int, console: Console) -> list[dict[str, Any]]:
    for _, take in runs:
        take()  # warms up
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in track(range(repetitions), "timing", console=console):
        for index in range(len(runs)):
            chosen = (index + turn) % len(runs)  # nobody always follows the same one
            start = time.perf_counter()
            runs[chosen][1]()
            seconds[chosen].append(time.perf_counter() - start)
    labels = [figures.label(row) for row, _ in runs]
    first = dict(zip(labels, seconds, strict=True))
    rows = []
    for (row, _), own in zip(runs, seconds, strict=True):
        row |= {"median_seconds": statistics.median(own), "seconds": own}
        for other in {"lora", "full"} & first.keys():
            pairs = zip(own, first[other], strict=True)
            row[f"of_{other}"] = statistics.median(a / b for a, b in pairs)
        rows.append(row)
    return rows


def _torch_peer(setting: workload.Setting) -> tuple[dict[str, Any], Callable[[], None]]:
    from experiments.benchmarks import torch_peer

    return torch_peer.lora(setting)


def _table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    table = Table(
        title=f"{first['model']}, batch {first['batch']}, {first['dtype']}, "
        f"{len(first['seconds'])} repetitions: {first['device']}"
    )
    for name in ("method", "s/step", "best", "/lora", "/full", "compile"):
        left = name == "method"
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    for row in rows:
        ratios = [row.get(f"of_{other}") for other in ("lora", "full")]
        table.add_row(
            figures.label(row),
            f"{row['median_seconds']:.4g}",
            f"{min(row['seconds']):.4g}",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            f"{row['compile_seconds']:.1f}",
        )
    return table


if __name__ == "__main__":
    main()
