r"""Times fused kernels against plain JAX, layer by layer, and compares their numbers.

    python -m experiments.benchmarks.kernels --layers 768x3072x12608 4096x11008x16384

computes `y`, `dx` and the parameters' gradients of one layer (inputs x outputs x rows)
in one program: a dense layer trained in full, LoRA, and SNELLA with
`implementation="xla"` and `"pallas"`. The programs take turns, so that a slow minute of
the machine affects each; figures are medians and paired ratios to the dense layer.

    python -m experiments.benchmarks.kernels --target h100

compiles them for a device that is not there: temporaries and seconds of compilation.
Prints a table and writes `kernels.json` into `--out`.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import terminal
from experiments.benchmarks import targets
from experiments.paths import Given, check_out
from experiments.reports import result_files
from snella_jax import adapted_dense, kernels
from snella_jax.ops.matmul import matmul
from snella_jax.ops.pallas.target import Target, assumed, current

PROGRAM = "python -m experiments.benchmarks.kernels"
PLATFORMS = {"h100": Target("gpu"), "tpu-v5e": Target("tpu")}
METHODS = ("dense", "lora", "xla", "pallas")


@dataclasses.dataclass(frozen=True)
class KernelsConfig:
    """Options of `python -m experiments.benchmarks.kernels`."""

    target: targets.Target = "local"
    """Device to time on (local), or to compile for only."""
    layers: tuple[str, ...] = ("768x3072x12608", "4096x11008x16384")
    """Layers, as inputs x outputs x rows."""
    dtype: str = "bfloat16"
    """Dtype of the input and of the frozen weight."""
    rank: int = 8
    """Rank of the factors."""
    kernel: str = "mix_k"
    """Kernel of the update."""
    gate: str = "product"
    """Gate of the update."""
    density: float = 0.3
    """Share of the weights that move."""
    sketch: int = 1
    """Rows to one that is kept for the gradient of SNELLA's factors."""
    repetitions: int = 20
    """Number of times that each program is timed."""
    out: Given = Path("runs/kernels")
    """Folder to write kernels.json into."""


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measures, and returns the rows of `kernels.json`."""
    config = tyro.cli(KernelsConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        if config.repetitions < 1:
            raise ValueError(f"repetitions={config.repetitions}: expected at least 1.")
        layers = [_sizes(name) for name in config.layers]
        device = targets.devices(config.target)[0]
        if config.target == "local" and current() is None:
            raise ValueError(
                f"There are no kernels for {jax.default_backend()}: expected a TPU "
                "from v5e or an NVIDIA GPU from Hopper on, or --target h100 or "
                "tpu-v5e, to compile only."
            )
    console = terminal.console()
    rows = []
    for sizes in layers:
        rows += _layer(config, device, sizes, console)
    result_files.write(config.out, "kernels", rows, console, table=_table(rows))
    return rows


def _sizes(layer: str) -> tuple[int, int, int]:
    parts = layer.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(
            f"layers={layer}: expected inputs x outputs x rows, 768x3072x64."
        )
    n, m, rows = map(int, parts)
    return n, m, rows


def _layer(
    config: KernelsConfig, device: Any, sizes: tuple[int, int, int], console: Console
) -> list[dict[str, Any]]:
    n, m, count = sizes
    here = config.target == "local"
    rows, programs = [], []
    for method in METHODS:
        function, arguments = _program(config, sizes, method)
        target = current() if here else PLATFORMS[config.target]
        assert target is not None
        start = time.perf_counter()
        where = jax.sharding.SingleDeviceSharding(device)
        with assumed(target):  # on one device, of however many
            lowered = jax.jit(function, in_shardings=where, out_shardings=where).lower(
                *jax.eval_shape(arguments)
            )
        program = lowered.compile()
        seconds = time.perf_counter() - start
        memory: Any = program.memory_analysis()
        rows.append(
            {
                **dataclasses.asdict(config),
                "out": str(config.out),
                "layers": f"{n}x{m}x{count}",
                "method": method,
                "temporary_bytes": memory.temp_size_in_bytes,
                "compile_seconds": round(seconds, 1),
                "device": targets.describe(config.target),
                "jax": jax.__version__,
            }
        )
        programs.append((program, arguments))
    if here:
        _time(config, rows, programs, console)
    return rows


def _program(
    config: KernelsConfig, sizes: tuple[int, int, int], method: str
) -> tuple[Callable[..., Any], Callable[[], Any]]:
    """Returns a program, and a function that makes its arguments."""
    n, m, count = sizes
    kernel = kernels.named(config.kernel)
    dtype = jnp.dtype(config.dtype)
    key = jax.random.key(0) if config.sketch > 1 else None

    def layer(x, parameters, w0):
        if method == "dense":
            return matmul(x, parameters.astype(dtype))
        if method == "lora":
            a, b = (v.astype(dtype) for v in parameters)
            return matmul(x, w0) + matmul(matmul(x, a), b)
        budget = int(config.density * n * m)
        how: Any = {"gate": config.gate, "implementation": method, "key": key}
        how["sketch"] = config.sketch
        return adapted_dense(x, w0, parameters, budget, kernel=kernel, **how)

    def run(x, parameters, w0, g):
        y, back = jax.vjp(lambda x, own: layer(x, own, w0), x, parameters)
        return y, back(g)

    def arguments():
        keys = iter(jax.random.split(jax.random.key(1), 6))

        def draw(*shape, dtype=dtype, scale=1.0):
            return scale * jax.random.normal(next(keys), shape, dtype)

        x, w0, g = draw(count, n), draw(n, m, scale=0.02), draw(count, m)
        wide = {"dtype": jnp.float32, "scale": 0.02}
        parameters: Any = kernel.init(next(keys), (n, m), config.rank)
        if method == "dense":
            parameters = draw(n, m, **wide)
        elif method == "lora":
            parameters = (draw(n, config.rank, **wide), draw(config.rank, m, **wide))
        return x, parameters, w0, g

    return run, arguments


def _time(config: KernelsConfig, rows: list, programs: list, console: Console) -> None:
    """Adds seconds and ratios to the rows, and how far the kernels' numbers are off."""
    ready = [(program, jax.jit(arguments)()) for program, arguments in programs]
    outputs = [jax.block_until_ready(program(*own)) for program, own in ready]
    _, _, plain, fused = outputs
    rows[-1]["largest_difference"] = {
        jax.tree_util.keystr(path): difference
        for path, difference in jax.tree.leaves_with_path(
            jax.tree.map(_difference, fused, plain)
        )
    }
    del outputs, plain, fused
    seconds: list[list[float]] = [[] for _ in ready]
    for turn in track(range(config.repetitions), "timing", console=console):
        for index in range(len(ready)):
            chosen = (index + turn) % len(ready)  # nobody always follows the same one
            program, own = ready[chosen]
            start = time.perf_counter()
            jax.block_until_ready(program(*own))
            seconds[chosen].append(time.perf_counter() - start)
    for row, own in zip(rows, seconds, strict=True):
        pairs = zip(own, seconds[0], strict=True)
        row["seconds"] = own
        row["median_seconds"] = statistics.median(own)
        row["of_dense"] = statistics.median(a / b for a, b in pairs)


def _difference(one: jax.Array, other: jax.Array) -> float:
    """Returns the largest difference, of the largest number."""
    one, other = (v.astype(jnp.float32) for v in (one, other))
    return float(abs(one - other).max() / abs(other).max())


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{rows[0]['kernel']}, {rows[0]['dtype']}: {rows[0]['device']}")
    for name in ("layer", "method", "ms", "/dense", "MiB", "compile", "off by"):
        left = name in ("layer", "method")
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    for row in rows:
        timed = "seconds" in row
        off = row.get("largest_difference", {})
        table.add_row(
            row["layers"],
            row["method"],
            f"{1e3 * row['median_seconds']:.3g}" if timed else "",
            f"{row['of_dense']:.2f}" if timed else "",
            f"{row['temporary_bytes'] / 2**20:.1f}",
            f"{row['compile_seconds']:.1f}",
            f"{max(off.values()):.1e}" if off else "",
        )
    return table


if __name__ == "__main__":
    main()
