"""Measures images per second: those the pipeline delivers, those a step consumes.

    python -m experiments.benchmarks.input_rate --task elpv --model dinov2_s14 --batch 8

The streams (VTAB's resize, FGVC's random crops) and the steps (LoRA, SNELLA) take
turns on the local device. A stream that delivers fewer images than the fastest step
consumes would slow training down. Prints a table and writes `input_rate.json` into
`--out`.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import terminal
from experiments.benchmarks import targets, throughput, workload
from experiments.data import pipeline
from experiments.data.task import Task
from experiments.data.transforms import Transform
from experiments.paths import Given, check_out
from experiments.reports import result_files
from experiments.tasks import catalogue
from snella_jax import models

PROGRAM = "python -m experiments.benchmarks.input_rate"


@dataclasses.dataclass(frozen=True)
class RateConfig:
    """Options of `python -m experiments.benchmarks.input_rate`."""

    task: str = "elpv"
    """Name of a task, or path of a folder or CSV file."""
    data_dir: Path = catalogue.DATA_DIR
    """Folder with TFDS's prepared sets and unpacked archives."""
    model: str = "dinov2_s14"
    """Preset of snella_jax.models; the streams have its image size."""
    batch: int = 8
    """Images in a step."""
    dtype: workload.Dtype = "float32"
    """Dtype of the computation and of the frozen weights."""
    batches: int = 200
    """Batches that a stream delivers in each turn; a few were made while steps ran."""
    repetitions: int = 5
    """Number of turns."""
    threads: int = pipeline.Reading.threads
    """Number of threads that make batches."""
    workers: int = 0
    """Number of processes that make batches; 0 for threads alone."""
    out: Given = Path("runs/input_rate")
    """Folder to write input_rate.json into."""


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measures, and returns the rows of `input_rate.json`."""
    config = tyro.cli(RateConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        for name in ("batches", "repetitions", "threads"):
            if getattr(config, name) < 1:
                raise ValueError(
                    f"{name}={getattr(config, name)}: expected at least 1."
                )
        steps = {
            f"step, {method}": workload.checked(
                workload.Setting(
                    method,
                    config.model,
                    config.batch,
                    dtype=config.dtype,
                    frozen_dtype=config.dtype,
                )
            )
            for method in ("lora", "snella")
        }
        task = catalogue.load(config.task, config.data_dir)
        streams = {f"stream, {crop}": _stream(crop, task, config) for crop in CROPS}
    console = terminal.console()
    runs = dict(streams)
    for name, setting in track(steps.items(), "compiling", console=console):
        runs[name] = _images_of(throughput.compiled(setting)[1], config.batch)
    rows = _timed(runs, config, console)
    result_files.write(config.out, "input_rate", rows, console, table=_table(rows))
    return rows


CROPS = ("resize", "random")


def _stream(crop: Any, task: Task, config: RateConfig) -> Callable[[], int]:
    """Returns a function that takes some batches and returns their number of images."""
    transform = Transform(models.IMAGE_PRESETS[config.model].image_hw, crop)
    batches = iter(
        pipeline.training(
            task.train,
            transform,
            batch=config.batch,
            epochs=1_000_000,
            seed=0,
            reading=pipeline.Reading(config.threads, workers=config.workers),
        )
    )
    return lambda: _take(batches, config.batches)


def _take(batches: Iterator[Any], count: int) -> int:
    return sum(len(next(batches)["label"]) for _ in range(count))


def _images_of(take: Callable[[], None], batch: int) -> Callable[[], int]:
    def run() -> int:
        take()
        return batch

    return run


def _timed(
    runs: dict[str, Callable[[], int]], config: RateConfig, console: Console
) -> list[dict[str, Any]]:
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for turn in track(range(config.repetitions + 1), "timing", console=console):
        for name, run in runs.items():
            start = time.perf_counter()
            images = run()
            if turn:  # the first one warms up
                rates[name].append(images / (time.perf_counter() - start))
    fastest = max(
        statistics.median(own) for name, own in rates.items() if "step" in name
    )
    settings = dataclasses.asdict(config) | {"out": None, "data_dir": None}
    shared = {name: value for name, value in settings.items() if value is not None}
    shared |= {"device": targets.describe("local"), "jax": jax.__version__}
    return [
        {
            "what": name,
            "images_per_second": statistics.median(own),
            "of_the_fastest_step": statistics.median(own) / fastest,
            "every": own,
            **shared,
        }
        for name, own in rates.items()
    ]


def _table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    table = Table(
        title=f"{first['task']}, {first['model']}, batch {first['batch']}, "
        f"{first['dtype']}: {first['device']}"
    )
    for name in ("", "images/s", "slowest", "/fastest step"):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    for row in rows:
        table.add_row(
            row["what"],
            f"{row['images_per_second']:.1f}",
            f"{min(row['every']):.1f}",
            f"{row['of_the_fastest_step']:.1f}",
        )
    return table


if __name__ == "__main__":
    main()
