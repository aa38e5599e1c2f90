r"""Measures the compiled peak memory of one training step, method by method.

    python -m experiments.benchmarks.memory --target h100 --batch 8 \
        --model vit_b16 vit_l16 vit_h14

compiles the step of every method for the target, which need not be present, and asks
the compiler how much it will allocate for arguments, results and temporaries. TFLOP
counts a step's matmuls, those that are computed again included. Prints a table and
writes `memory.json` and `memory.png` (memory against the size of the model, as in the
paper's Figure 7(b, c) and Table XVI) into `--out`. Full fine-tuning keeps its
weights in float32, as it has to; LoRA's cast of a frozen weight is recomputed, so that
no copy of it counts against LoRA. The total of SPT, GPS and NOAH is that of their first
stage where it takes more (`locating_bytes`).

    python -m experiments.benchmarks.memory --target tpu-v5e --model llama2_7b \
        --chips 16 --mesh fsdp=4,tensor=4

does so on a mesh of chips, see `layout`: bytes are those of one chip, and a second
table has the collectives of a step. A step that does not fit the chip is a row that
says so, with the bytes that it would take.

    python -m experiments.benchmarks.memory --target h100 --model sd3_medium --batch 1

does so for DreamBooth on Stable Diffusion 3, pictures of 512 x 512: prompts and moments
of latents are given, so that the MMDiT alone is in memory.

    python -m experiments.benchmarks.memory --target h100 --function my_steps:tuning

does so for a step of your own: `tuning` in `my_steps.py` of the current folder returns
a step (jitted with what it donates, or not) and the tuple of its arguments.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import tyro
from jax.sharding import SingleDeviceSharding
from rich.progress import track
from rich.table import Table

from experiments import terminal
from experiments.benchmarks import (
    allocation,
    collectives,
    figures,
    layout,
    operations,
    own_step,
    targets,
    workload,
)
from experiments.benchmarks.allocation import GIB
from experiments.benchmarks.layout import Layout
from experiments.methods import registry
from experiments.methods.noah import Noah
from experiments.methods.sensitivity import Scored
from experiments.paths import Given, check_out
from experiments.reports import result_files
from snella_jax.models import llama

PROGRAM = "python -m experiments.benchmarks.memory"
PARTS = ("total", "argument", "temporary")


@dataclasses.dataclass(frozen=True)
class MemoryConfig(workload.Options):
    """Options of `python -m experiments.benchmarks.memory`."""

    target: targets.Target = "local"
    """Device that the step is compiled for. On the CPU, XLA's scheduler does not save
    memory: its figures rank methods badly."""
    model: tuple[str, ...] = ("vit_b16",)
    """Presets of snella_jax.models."""
    chips: int = 1
    """Chips that a step runs on."""
    mesh: str | None = None
    """Axes of the chips: data=N,fsdp=N,tensor=N. Default: all of them along fsdp."""
    factors: layout.Factors = "split"
    """whole: each chip has all factors. follow: they are split as their matrix is.
    split: over all of fsdp and tensor. local: so, too, and every chip works on whole
    matrices; without an axis tensor."""
    hbm: float | None = None
    """GiB of a TPU that its compiler may use. With much room it fetches weights ahead;
    with little it spares memory. A step that still takes more is a row that says so."""
    function: str | None = None
    """MODULE:FUNCTION of a step of your own, in place of those of methods; only
    --target and --out count then."""
    out: Given = Path("runs/memory")
    """Folder to write memory.json and memory.png into."""

    def where(self) -> SingleDeviceSharding | Layout:
        """Returns the device of the step, or its layout on several.

        A language model has a layout on one device, too.

        Raises:
          ValueError: language models and others at once, methods with a first stage on
            several chips, `hbm` of another target, or as `layout.make`.
          ModuleNotFoundError: as `targets.devices`.
        """
        if self.hbm is not None and not (self.target == "tpu-v5e" and self.hbm > 0):
            raise ValueError(f"hbm={self.hbm}: expected GiB, and --target tpu-v5e.")
        texts = [name for name in self.model if name in llama.PRESETS]
        if texts and len(texts) < len(self.model):
            raise ValueError(
                "--model: expected language models alone, or none, not "
                f"{', '.join(name for name in self.model if name not in texts)} too."
            )
        if not texts and self.chips == 1 and self.mesh is None:
            return targets.sharding(self.target)
        if located := [*filter(_has_first_stage, self.method or ())]:
            raise ValueError(
                f"--method {' '.join(located)}: expected methods without a first stage "
                "on a mesh."
            )
        chips = targets.devices(self.target, self.chips)
        return layout.make(self.mesh, chips, self.batch, self.factors)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Compiles, and returns the rows of `memory.json`."""
    config = tyro.cli(MemoryConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        if config.function is not None:
            return _of_a_function(config, config.function)
        if not config.model:
            raise ValueError("--model names nothing: expected at least one.")
        settings = [each for name in config.model for each in config.settings(name)]
        where = config.where()
    console = terminal.console()
    rows = [
        row(setting, config.target, where, config.hbm)
        for setting in track(settings, "compiling", console=console)
    ]
    table = _table(rows)
    result_files.write(config.out, "memory", rows, console, figures.memory, table)
    if isinstance(where, Layout):
        console.print(_collectives(rows))
    return rows


def _has_first_stage(method: str) -> bool:
    return isinstance(registry.METHODS.get(method), Scored | Noah)


def _of_a_function(config: MemoryConfig, name: str) -> list[dict[str, Any]]:
    """Compiles a step of the user's own; returns the row of `memory.json`."""
    console, where = terminal.console(), targets.sharding(config.target)
    found = own_step.row(name, own_step.found(name), config.target, where)
    table = own_step.table(found)
    result_files.write(config.out, "memory", [found], console, table=table)
    console.print(own_step.ADVICE, soft_wrap=True)
    return [found]


def row(
    setting: workload.Setting,
    target: targets.Target,
    where: SingleDeviceSharding | Layout,
    hbm: float | None = None,
) -> dict[str, Any]:
    """Compiles one step for the devices of `where`; returns its row of `memory.json`.

    All bytes are those of one device. `hbm` is as in `MemoryConfig`.
    """
    on_mesh = where if isinstance(where, Layout) else None
    one, first = workload.abstract(setting, on_mesh), workload.locating(setting)
    start = time.perf_counter()
    found = _allocated(one, where, hbm)
    seconds = time.perf_counter() - start
    found["locating_bytes"] = (
        _allocated(first, where, hbm)["total_bytes"] if first else 0
    )
    found["total_bytes"] = max(found["total_bytes"], found["locating_bytes"])
    capacity = targets.CAPACITY.get(target, math.inf)
    found["fits"] = found.get("fits", True) and found["total_bytes"] <= capacity
    if on_mesh is not None:
        found |= {
            "chips": on_mesh.mesh.size,
            "mesh": str(on_mesh),
            "factors": on_mesh.factors,
            "sequence": setting.sequence,
        }
    if hbm is not None:
        found["hbm"] = hbm
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
        "memory": setting.memory,
        "activation": setting.activation,
        "sketch": setting.sketch,
        "attention": setting.attention,
        "parameters": workload.parameters(setting.model),
        "trainable": workload.size(one.arguments[0]),
        "compile_seconds": round(seconds, 1),
        "device": targets.describe(target),
        "jax": jax.__version__,
    }


def _allocated(
    one: workload.Step, where: SingleDeviceSharding | Layout, hbm: float | None
) -> dict[str, Any]:
    """Returns the bytes that a compiled step allocates, in all and by part.

    Also the operations of its matmuls, and on a mesh its collectives. Where
    the compiler refuses, `fits`, False.
    """
    given, made = where, where
    if isinstance(where, Layout):
        given = where.of_arguments(one.arguments)
        made = *given[: len(one.donated)], where.whole
    compiler = jax.jit(
        one.run, donate_argnums=one.donated, in_shardings=given, out_shardings=made
    )
    traced = compiler.trace(*one.arguments)
    found, program = allocation.compiled(traced.lower(), hbm)
    found["matmul_flops"] = operations.matmul_flops(traced.jaxpr.jaxpr)
    if isinstance(where, Layout) and program is not None:
        found["collectives"] = collectives.of(program.as_text() or "")
    return found


def _table(rows: list[dict[str, Any]]) -> Table:
    first, on_mesh = rows[0], "mesh" in rows[0]
    says_fits = on_mesh or not all(r["fits"] for r in rows)
    chips = f", a chip, {first['mesh']}" if on_mesh else ""
    several = len({r["model"] for r in rows}) > 1
    what = "GiB in one step" if several else f"{first['model']}, GiB in one step"
    table = Table(
        title=f"{what}, batch {first['batch']}, {first['dtype']}, frozen "
        f"{first['frozen_dtype']}: {first['device']}{chips}"
    )
    staged = not says_fits and any(r["locating_bytes"] for r in rows)
    names = ["model"] * several + ["method", "total", "args", "temp"]
    names += ["fits"] * says_fits + ["locating"] * staged
    for name in (*names, "/lora", "/full", "TFLOP", "compile"):
        left = name in ("model", "method")
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    totals = {(r["model"], figures.label(r)): r["total_bytes"] for r in rows}
    for r in rows:
        ratios = [
            f"{r['total_bytes'] / totals[r['model'], other]:.3f}"
            if (r["model"], other) in totals
            else ""
            for other in ("lora", "full")
        ]
        parts = [
            f"{r[key] / GIB:.2f}" if (key := f"{part}_bytes") in r else ""
            for part in (*PARTS, *(["locating"] * staged))
        ]
        if says_fits:
            parts.append("yes" if r["fits"] else "NO")
        cost = f"{r['matmul_flops'] / 1e12:.3g}", f"{r['compile_seconds']:.0f} s"
        model = [r["model"]] * several
        table.add_row(*model, figures.label(r), *parts, *ratios, *cost)
    return table


def _collectives(rows: list[dict[str, Any]]) -> Table:
    """Returns the collectives of every step that was compiled."""
    first = rows[0]
    table = Table(title=f"Collectives of one step, a chip, {first['mesh']}")
    for name in ("model", "method", "kind", "count", "under 1 KiB", "GiB"):
        left = name in ("model", "method", "kind")
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    for r in rows:
        for kind, own in r.get("collectives", {}).items():
            numbers = f"{own['count']:,}", f"{own['small']:,}"
            size = f"{own['bytes'] / GIB:.3f}"
            table.add_row(r["model"], figures.label(r), kind, *numbers, size)
    return table


if __name__ == "__main__":
    main()
