"""Several tasks of images, each in a run folder of its own, and one table.

They run one after the other, or several at a time, each in a process of its own
(`cells.py`). `suite.json` holds the config of every task. A task with a `summary.json`
is finished; the others are resumed or begun. A task whose loss is not finite does not
stop the others. Workers share the methods of a single task in the same way.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

import filelock
from rich.console import Console

from experiments import files, paths, terminal
from experiments.config import command_line, run_config
from experiments.config.cluster import Cluster
from experiments.config.images import ImageConfig
from experiments.names import unknown
from experiments.pretrained import base_models
from experiments.reports import finished, table
from experiments.runs import cluster, folder, images, setup
from experiments.runs.cells import Busy, Cell
from experiments.runs.run import RunFailed, run
from experiments.tasks.catalogue import TASK_LIST
from experiments.training.stopping import Stopped

FILE = "suite.json"
Presets = command_line.Presets[ImageConfig]


def start(
    program: str,
    name: str,
    tasks: Mapping[str, ImageConfig],
    console: Console,
    workers: Cluster,
) -> None:
    """Runs a config for every task, into `out/TASK`.

    Args:
      program: name of the command in error messages.
      name: name of the suite; that of its folder if the configs name none.
      tasks: config of each task, by name; or of each method of one task.
      workers: those that run them; by default this process does.

    Raises:
      SystemExit: data or weights are missing, the folder is not empty, a run failed or
        was interrupted; says how to go on.
    """
    some = next(iter(tasks.values()))
    lacking = [error for task in tasks.values() if (error := images.missing(task))]
    if lacking:
        raise SystemExit(
            f"{program}: {len(lacking)} of {len(tasks)} tasks cannot be run; --tasks "
            "runs some of them.\n  " + "\n  ".join(lacking)
        )
    out = some.out or Path("runs") / name / time.strftime("%Y%m%d-%H%M%S")
    with terminal.exit_on_error(program):
        paths.check_out(out)
        base_models.load(some, classes=2)
    if files.is_primary():
        folder.check_new(out)
        out.mkdir(parents=True, exist_ok=True)
        values = {task: run_config.as_dict(config) for task, config in tasks.items()}
        files.write(out / FILE, {"program": program, "tasks": values})
    _run_all(program, tasks, out, console, workers)


def resume(out: Path, console: Console, workers: Cluster) -> None:
    """Runs what is left of an interrupted suite; errors as `start`."""
    found = files.read(out / FILE)
    tasks = {
        task: command_line.from_values(
            found["program"], values, ImageConfig(), out / FILE
        )
        for task, values in found["tasks"].items()
    }
    setup.join_processes(next(iter(tasks.values())), console)
    _run_all(found["program"], tasks, out, console, workers)


def _run_all(
    program: str,
    tasks: Mapping[str, ImageConfig],
    out: Path,
    console: Console,
    workers: Cluster,
) -> None:
    own = {Cell(task, out / task): config for task, config in tasks.items()}

    def is_finished(cell: Cell) -> bool:
        return (cell.place / "summary.json").exists()

    def tried(cell: Cell) -> str | None:
        if is_finished(cell):
            return None
        where = f"{cell.name}, {list(own).index(cell) + 1} of {len(own)}"
        return _tried(where, cell, own[cell], out, console)

    words = ["--resume", str(out)]
    work = cluster.Work(program, words, out, list(own), is_finished, tried)
    failed = cluster.done(workers, work, console)
    if files.is_primary() and any(map(is_finished, own)):
        with filelock.FileLock(out / ".table"):
            table.write(table.table(finished.collect([out], console)), out, console)
    if failed:
        raise SystemExit("\n".join([*failed, f"Go on with them by --resume {out}"]))


def _tried(
    where: str, cell: Cell, config: ImageConfig, out: Path, console: Console
) -> str | None:
    """Runs what is left of a task; returns what failed.

    Args:
      where: text above it.

    Raises:
      SystemExit: it was interrupted; says how to go on.
      Busy: somebody resumed this task alone.
    """
    console.rule(where)
    begun = (cell.place / "config.json").exists()
    config = dataclasses.replace(config, out=cell.place)
    try:
        run(images.prepared(cell.name, config, console), resume=begun)
    except (RunFailed, ValueError, ModuleNotFoundError, OSError) as error:
        failed = f"{cell.name}: {error}"
        console.print(failed, style="red", soft_wrap=True)
        return failed
    except folder.InUse as error:
        raise Busy(cell.name) from error
    except Stopped:
        console.print(f"The rest goes on by --resume {out}", soft_wrap=True)
        raise
    except SystemExit as stop:
        raise SystemExit(f"{stop}\nThe rest goes on by --resume {out}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"Go on with it by --resume {out}") from None
    return None


def configs(
    program: str, presets: Presets, suite: str, argv: list[str]
) -> dict[str, ImageConfig]:
    """Returns the configs that a command line names, by task.

    Args:
      program: name of the command in error messages.
      presets: presets of the suite's tasks, by name.
      suite: name of the suite.
      argv: the command line, with `--config` of the suite.

    Raises:
      SystemExit: a word is wrong, as in `command_line.parse`, or the suite has no such
        task.
    """
    first = command_line.parser(program)
    first.add_argument("--config")
    first.add_argument("--tasks", nargs="+", default=list(presets))
    known, rest = first.parse_known_args(argv)
    if any(word.split("=")[0] == "--task" for word in rest):
        raise SystemExit(f"{program}: {suite} takes --tasks, not --task.")
    for task in known.tasks:
        if task not in presets:
            text = unknown(f"task of {suite}", task, presets, TASK_LIST)
            raise SystemExit(f"{program}: {text}")
    return {
        task: command_line.parse(program, presets, ["--config", task, *rest], suite)[1]
        for task in known.tasks
    }
