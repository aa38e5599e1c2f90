r"""Measures the parts of a training step's time, method by method.

    python -m experiments.benchmarks.profile --model vit_b16 --batch 8 \
        --method full lora snella

The methods take turns on the local device, a step at a time, under JAX's profiler. The
time of every operation that XLA scheduled counts for the part of the step that it
computes; operations that run at the same time share it. Figures are medians over the
steps. Prints a table and writes `profile.json` and `profile.png` into `--out`. Tested
on CPUs only.
"""

import collections
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import tyro
from jax.profiler import ProfileData, ProfileOptions
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import terminal
from experiments.benchmarks import figures, targets, workload
from experiments.paths import Given, check_out
from experiments.reports import result_files

PROGRAM = "python -m experiments.benchmarks.profile"

# The first that is found in the name of an operation is its part.
PARTS = {
    "threshold": "snella_threshold",
    "delta and its gradient": "snella_delta",
    "attention": r"\battention\b",
    "matmuls": "dot_general|conv_general",
    "norms, GELU, sums": "jvp",
    "optimizer, importance": "",
}
Span = tuple[float, float, str]  # start, end, name of an operation
COPIES = "copies, zeros"  # operations of XLA's own, which have no name
REST = "unattributed"  # between operations, or not told to the profiler


@dataclass(frozen=True)
class ProfileConfig(workload.Options):
    """Options of `python -m experiments.benchmarks.profile`."""

    method: tuple[str, ...] = ("full", "lora", "snella")
    """Methods to compare."""
    dtype: workload.Dtype = "float32"
    """Dtype of the computation."""
    frozen_dtype: workload.Dtype = "float32"
    """Dtype of the weights that do not train."""
    model: str = "vit_b16"
    """Preset of snella_jax.models."""
    steps: int = 7
    """Number of steps of each method that are profiled."""
    out: Given = Path("runs/profile")
    """Folder to write profile.json and profile.png into."""


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Profiles, and returns the rows of `profile.json`."""
    config = tyro.cli(ProfileConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        if config.steps < 1:
            raise ValueError(f"steps={config.steps}: expected at least 1.")
        settings = config.settings(config.model)
    console = terminal.console()
    runs = [
        compiled(setting) for setting in track(settings, "compiling", console=console)
    ]
    rows = _in_turns(runs, config.steps, console)
    result_files.write(
        config.out, "profile", rows, console, figures.profile, _table(rows)
    )
    return rows


def compiled(setting: workload.Setting) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Compiles a setting; returns its row, and a function that profiles one step.

    The function returns the seconds of the step and those of each part.
    """
    one = workload.build(setting)
    lowered = jax.jit(one.run, donate_argnums=one.donated).lower(*one.arguments)
    run = lowered.compile()
    arguments = list(one.arguments)
    names = operation_names(run.as_text() or "")
    options = ProfileOptions()
    options.python_tracer_level = 0

    def take() -> tuple[float, dict[str, float]]:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                start = time.perf_counter()
                *arguments[:2], loss = run(*arguments)
                loss.block_until_ready()
                seconds = time.perf_counter() - start
            (path,) = Path(folder).rglob("*.xplane.pb")
            operations = own_seconds(ProfileData.from_file(str(path)))
        parts = dict.fromkeys([*PARTS, COPIES], 0.0)
        for operation, spent in operations.items():
            parts[part(names.get(operation, ""))] += spent
        return seconds, parts | {REST: seconds - sum(parts.values())}

    row = asdict(setting) | {
        "path": setting.path,
        "attention": setting.attention,
        "device": targets.describe("local"),
        "jax": jax.__version__,
    }
    return row, take


def _in_turns(runs: list, steps: int, console: Console) -> list[dict[str, Any]]:
    for _, take in runs:
        take()  # warms up
    taken: list[list[tuple[float, dict[str, float]]]] = [[] for _ in runs]
    for _ in track(range(steps), "profiling", console=console):
        for own, (_, take) in zip(taken, runs, strict=True):
            own.append(take())
    return [
        row
        | {
            "seconds": statistics.median(seconds for seconds, _ in own),
            "parts": {
                name: statistics.median(parts[name] for _, parts in own)
                for name in own[0][1]
            },
            "steps": steps,
        }
        for (row, _), own in zip(runs, taken, strict=True)
    ]


def part(name: str) -> str:
    """Returns the part of a step that an operation of this name belongs to."""
    if not name:
        return COPIES
    return next(key for key, pattern in PARTS.items() if re.search(pattern, name))


def operation_names(hlo: str) -> dict[str, str]:
    """Returns JAX's name of each operation of a compiled program.

    A fusion is named after its matmul if it has one, else after its result, else after
    the last operation in it that has a name.
    """
    names: dict[str, str] = {}
    fusions, matmuls, last = {}, {}, {}
    inside = ""
    for line in hlo.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            inside = opened[1]
        made = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = .*? ([\w-]+)\(", line)
        if made is None:
            continue
        called = re.search(r'op_name="([^"]*)"', line)
        if called:
            names[made[1]] = last[inside] = called[1]
            if made[2] in ("dot", "convolution"):  # XLA may have renamed it
                names[made[1]] = matmuls[inside] = f"{called[1]}/dot_general"
        if fused := re.search(r" calls=%?([\w.-]+)", line):
            fusions[made[1]] = fused[1]
    from_inside = {
        name: last[fused] for name, fused in fusions.items() if fused in last
    }
    heaviest = {
        name: matmuls[fused] for name, fused in fusions.items() if fused in matmuls
    }
    return from_inside | names | heaviest


def own_seconds(profile: Any) -> dict[str, float]:
    """Returns the seconds of each operation, without those inside a loop of it.

    Operations that run at the same time share it: all of them sum to the time in which
    any ran.
    """
    spans: list[Span] = []
    for plane in profile.planes:
        lines = list(plane.lines)
        # An accelerator's plane repeats its streams in a line of this name.
        for line in [line for line in lines if line.name == "XLA Ops"] or lines:
            spans += _without_children([
                (event.start_ns, event.start_ns + event.duration_ns, str(name))
                for event in line.events
                if (name := dict(event.stats).get("hlo_op"))
            ])  # fmt: skip
    return {name: spent / 1e9 for name, spent in _shares(spans).items()}


def _without_children(spans: list[Span]) -> list[Span]:
    """Returns the spans of one thread, cut where another one lies inside."""
    pieces: list[Span] = []
    around: list[tuple[float, str]] = []  # the ends and names of what is running
    now = 0.0

    def advance(to: float) -> None:
        nonlocal now
        while around and around[-1][0] <= to:
            end, name = around.pop()
            pieces.append((now, end, name))
            now = max(now, end)
        if around:
            pieces.append((now, to, around[-1][1]))
        now = to

    for start, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        advance(start)
        around.append((end, name))
    advance(math.inf)
    return [piece for piece in pieces if piece[0] < piece[1]]


def _shares(spans: list[Span]) -> dict[str, float]:
    """Returns the length of all spans of a name; those that overlap share it."""
    changes = collections.Counter[float]()
    for start, end, _ in spans:
        changes[start] += 1
        changes[end] -= 1
    each, active, before, passed = {}, 0, 0.0, 0.0  # passed: what one span would get
    for moment in sorted(changes):
        passed += (moment - before) / active if active else 0
        before, each[moment] = moment, passed
        active += changes[moment]
    total = collections.defaultdict(float)
    for start, end, name in spans:
        total[name] += each[end] - each[start]
    return total


def _table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    table = Table(
        title=f"milliseconds of a step, {first['model']}, batch {first['batch']}, "
        f"{first['dtype']}: {first['device']}"
    )
    table.add_column("part")
    for one in rows:
        table.add_column(figures.label(one), justify="right")
    for name in first["parts"]:
        table.add_row(name, *(f"{1e3 * one['parts'][name]:.0f}" for one in rows))
    table.add_section()
    table.add_row("step", *(f"{1e3 * one['seconds']:.0f}" for one in rows))
    return table


if __name__ == "__main__":
    main()
