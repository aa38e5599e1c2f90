r"""Measures `per_example` of several LoRAs: one pass together, and one pass for each.

    python -m experiments.benchmarks.several --model vit_s16 --image_size 112 --batch 16

The examples of a batch take turns among the adapters, which have a head of their own,
too. Both ways are compiled and run once, then they take turns. Seconds are those of the
process on all cores (CPU time), and ratios are medians of pairs: so is what other work
does to the machine. Prints a table and writes `several.json` into `--out`.

Expected: `K` adapters cost `K` passes one by one, and together one and a little, since
rank 8 adds 4% of the products of a ViT-S. Measured on two CPU cores: together 1.3, as
these products are small, with one more sum over every output.
"""

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx
from rich.table import Table

from experiments import terminal
from experiments.benchmarks import targets
from experiments.paths import Given, check_out
from experiments.reports import result_files
from snella_jax import SnellaConfig, adapt, models
from snella_jax.nnx import grouped, multi_adapter

PROGRAM = "python -m experiments.benchmarks.several"


@dataclasses.dataclass(frozen=True)
class SeveralConfig:
    """Options of `python -m experiments.benchmarks.several`."""

    model: str = "vit_s16"
    """Preset of snella_jax.models."""
    image_size: int = 112
    """Height and width of the images."""
    batch: int = 16
    """Number of examples."""
    rank: int = 8
    """Rank of the adapters, on every matrix of every block."""
    counts: tuple[int, ...] = (2, 4, 8)
    """Numbers of adapters in a batch."""
    repetitions: int = 5
    """Number of times that each way is timed."""
    out: Given = Path("runs/several")
    """Folder to write several.json into."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, and returns the content of `several.json`."""
    config = tyro.cli(SeveralConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        if config.repetitions < 1 or min(config.counts, default=0) < 2:
            raise ValueError(
                f"repetitions={config.repetitions}, counts={config.counts}: expected "
                "at least 1, and at least 2 adapters."
            )
    adapters, images = _adapters(config), _images(config)
    result = {
        **dataclasses.asdict(config),
        "rows": [_timed(adapters[:count], images, config) for count in config.counts],
        "device": targets.describe("local"),
        "jax": jax.__version__,
        "out": str(config.out),
    }
    result_files.write(
        config.out, "several", result, terminal.console(), table=_table(result)
    )
    return result


def _adapters(config: SeveralConfig) -> list[nnx.Module]:
    """Returns adapters whose `b` and heads are not 0, as if they had trained."""
    base = models.create(
        config.model,
        image_size=config.image_size,
        num_classes=10,
        rngs=nnx.Rngs(0),
    )
    lora = SnellaConfig(
        rank=config.rank,
        kernel="linear",
        gate="none",
        target_density=1,
        trainable="head",
    )
    found = []
    for seed in range(max(config.counts)):
        model = adapt(base, lora, rngs=nnx.Rngs(seed + 1))
        numbers = np.random.default_rng(seed)
        nnx.update(
            model,
            jax.tree.map(
                lambda x, numbers=numbers: numbers.normal(0, 0.02, x.shape).astype(
                    "f4"
                ),
                nnx.state(model, nnx.Param),
            ),
        )
        found.append(model)
    return found


def _images(config: SeveralConfig) -> np.ndarray:
    shape = config.batch, config.image_size, config.image_size, 3
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _timed(
    adapters: list[nnx.Module], images: np.ndarray, config: SeveralConfig
) -> dict[str, Any]:
    """Returns CPU seconds of both ways, and how far apart their outputs are."""
    rows = np.arange(len(images), dtype=np.int32) % len(adapters)
    named = {str(number): model for number, model in enumerate(adapters)}
    ways = (
        lambda: grouped.run(adapters, rows, (images,)),
        lambda: multi_adapter.pass_for_each(named, rows.astype(str), (images,)),
    )
    one, other = (np.asarray(way()) for way in ways)
    seconds: list[list[float]] = [[], []]
    for turn in range(config.repetitions):
        for index in (turn % 2, 1 - turn % 2):
            start = time.process_time()
            jax.block_until_ready(ways[index]())
            seconds[index].append(time.process_time() - start)
    ratios = [apart / together for together, apart in zip(*seconds, strict=True)]
    return {
        "adapters": len(adapters),
        "together_cpu_seconds": seconds[0],
        "apart_cpu_seconds": seconds[1],
        "apart_of_together": statistics.median(ratios),
        "difference": float(abs(one - other).max() / abs(other).max()),
    }


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"{result['model']} at {result['image_size']}, batch {result['batch']}, "
        f"rank {result['rank']}: {result['device']}"
    )
    for name in ("adapters", "together, CPU s", "one by one, CPU s", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        medians = (
            statistics.median(row[f"{way}_cpu_seconds"])
            for way in ("together", "apart")
        )
        table.add_row(
            str(row["adapters"]),
            *(f"{seconds:.3g}" for seconds in medians),
            f"{row['apart_of_together']:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
