r"""Measures what else tuned models do: LoRA, full, and SNELLA at several densities.

    python -m experiments.compare --config real_tasks --data DATA --keep_models \
        --methods full lora snella --seeds 0 1 --out runs/density_0.3
    python -m experiments.compare ... --methods snella --run.snella.target_density 0.1 \
        --pool --rates runs/density_0.3/results.json --out runs/density_0.1
    python -m experiments.studies.sparsity --runs runs/density_* --out runs/sparsity

- forgetting: nearest neighbours on another task's training images, by the features
  before and after tuning (leave-one-out, 3 neighbours);
- adding: the changes of two tasks' models of one seed in one model, heads apart: test
  accuracy of both, beside that of each model alone;
- robustness: test images with noise, blur, low contrast and JPEG artefacts;
- sizes of the delta file and of the adapter's.

`--few FOLDERS` adds comparisons with `--run.per_class`: accuracy by the number of
images. `measured.json` in `--out` keeps what is measured: the same command goes on with
the rest, and several may share a folder. Writes `report.md` and `report.json`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import filelock
import tyro
from rich.console import Console

from experiments import files, terminal
from experiments.paths import Given, check_out
from experiments.reports.text import markdown_tables, printed_tables
from experiments.studies import cells, keeping, sparsity_report
from experiments.studies.cells import Cell
from experiments.studies.tuned import Tuned, kept, not_kept

Measure = Literal["forgetting", "adding", "robustness", "sizes"]
Values = dict[str, dict[str, Any]]  # by measure, then `Tuned.key` and further names

PROGRAM = "python -m experiments.studies.sparsity"


@dataclasses.dataclass(frozen=True)
class SparsityConfig:
    """Options of `python -m experiments.studies.sparsity`."""

    runs: tuple[Given, ...]
    """Folders of `experiments.compare --keep_models`."""
    measures: tuple[Measure, ...] = ("sizes", "forgetting", "adding", "robustness")
    """Measures to take, in this order."""
    methods: tuple[str, ...] = ("full", "lora", "snella")
    """Methods to measure; others in the folders are left out."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to measure."""
    few: tuple[Given, ...] = ()
    """Folders of `experiments.compare` with --run.per_class, for accuracy by images."""
    data: Given | None = None
    """Folder of the tasks, if they lie elsewhere than when they were run."""
    out: Given = Path("runs/sparsity")
    """Folder to write measured.json, report.md and report.json into."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what is left, prints, and writes the report."""
    config = tyro.cli(SparsityConfig, prog=PROGRAM, args=argv, description=__doc__)
    console = terminal.console()
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        wanted = _wanted(config.runs, config)
        models = kept(wanted, config.data)
        few = _wanted(config.few, config)
        config.out.mkdir(parents=True, exist_ok=True)
        values = measured(models, config.measures, config.out, console)
        report = sparsity_report.made(models, values, few)
    tables = sparsity_report.tables(report)
    caption = f"{sparsity_report.CAPTION} {not_kept(wanted, models)}".strip()
    console.print(printed_tables(tables, caption))
    files.write(config.out / "report.json", report, indent=1)
    files.replace(config.out / "report.md", markdown_tables(tables, caption))
    console.print(f"report.md and report.json are in {config.out}", soft_wrap=True)


def _wanted(folders: Sequence[Path], config: SparsityConfig) -> list[Cell]:
    return [
        cell
        for cell in cells.read(folders)
        if cell.row.method in config.methods and cell.seed in config.seeds
    ]


def measured(
    models: Sequence[Tuned], measures: Iterable[Measure], out: Path, console: Console
) -> Values:
    """Takes the measures that `measured.json` lacks, and returns all.

    Other processes may write into the file meanwhile.
    """
    path = out / "measured.json"

    def known() -> Values:
        return files.read(path) or {}

    for measure in measures:
        for key, take in _tasks(measure, models):
            if key in known().get(measure, {}):
                continue
            console.print(f"{measure}: {key}", soft_wrap=True)
            found = take()
            with filelock.FileLock(path.with_suffix(".lock")):
                values = known()
                values.setdefault(measure, {})[key] = found
                files.write(path, values)
    return known()


def _tasks(
    measure: Measure, models: Sequence[Tuned]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields the name of each thing to measure, and what measures it."""
    if measure == "adding":
        for one, other in itertools.combinations(models, 2):
            alike = one.cell.label == other.cell.label
            if alike and one.cell.seed == other.cell.seed:
                key = one.beside(other.cell.task)
                yield key, lambda a=one, b=other: dict(keeping.adding(a, b))
        return
    first = {one.cell.task: one for one in reversed(models)}
    for one in models:
        if measure == "forgetting":
            for other in (own for task, own in first.items() if task != one.cell.task):
                key = one.beside(other.cell.task)
                yield key, lambda a=one, b=other: keeping.forgetting(a, b)
        elif measure == "robustness":
            yield one.key, lambda a=one: dict(keeping.robustness(a))
        else:
            yield one.key, lambda a=one: keeping.sizes(a)


if __name__ == "__main__":
    main()
