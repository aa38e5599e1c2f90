"""Several tasks one after the other, each in a run folder of its own, and one table.

`suite.json` holds the config of every task. A task whose `summary.json` is there is
finished; the others go on where they were, or begin. A task whose loss is not finite
does not stop the others.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import command, finished, folder, models, paths, report
from experiments import config as configs
from experiments import mesh as meshes
from experiments.config import RunConfig
from experiments.data import catalogue
from experiments.run import RunFailed, run

FILE = "suite.json"


def start(
    program: str, name: str, tasks: Mapping[str, RunConfig], console: Console
) -> None:
    """Runs a config for every task, into `out/TASK`.

    Raises:
      SystemExit: data or weights are missing, the folder is not empty, a run failed or
        was interrupted; says how to go on.
    """
    some = next(iter(tasks.values()))
    lacking = [error for task in tasks.values() if (error := missing(task))]
    if lacking:
        raise SystemExit(
            f"{program}: {len(lacking)} of {len(tasks)} tasks cannot be run; --tasks "
            "runs some of them.\n  " + "\n  ".join(lacking)
        )
    out = some.out or Path("runs") / name / time.strftime("%Y%m%d-%H%M%S")
    try:
        paths.check_out(out)
        models.load(some, classes=2)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"{program}: {error}") from error
    if folder.is_primary():
        if folder.in_use(out):
            raise SystemExit(
                f"{out} is not empty: name another folder with --out, or go on with "
                f"the runs in it with --resume {out}."
            )
        out.mkdir(parents=True, exist_ok=True)
        values = {task: configs.as_dict(config) for task, config in tasks.items()}
        folder.write(out / FILE, {"program": program, "tasks": values})
    _run_all(tasks, out, console)


def resume(out: Path, console: Console) -> None:
    """Goes on with what is left of an interrupted suite; errors as `start`."""
    found = folder.read(out / FILE)
    tasks = {
        task: command.from_values(found["program"], values)
        for task, values in found["tasks"].items()
    }
    command.join_processes(next(iter(tasks.values())), console)
    _run_all(tasks, out, console)


def _run_all(tasks: Mapping[str, RunConfig], out: Path, console: Console) -> None:
    failed = []
    for number, (task, config) in enumerate(tasks.items(), start=1):
        place = out / task
        if (place / "summary.json").exists():
            continue
        console.rule(f"{task}, {number} of {len(tasks)}")
        begun = (place / "config.json").exists()
        config = dataclasses.replace(config, out=place)
        try:
            run(command.prepared(task, config, console), resume=begun)
        except (RunFailed, ValueError, ModuleNotFoundError, OSError) as error:
            failed.append(f"{task}: {error}")
            console.print(failed[-1], style="red", soft_wrap=True)
        except SystemExit as stop:
            raise SystemExit(f"{stop}\nThe rest goes on by --resume {out}") from None
        except KeyboardInterrupt:
            raise SystemExit(f"Go on with it by --resume {out}") from None
    if folder.is_primary() and len(failed) < len(tasks):
        report.write(report.table(finished.collect([out])), out, console)
    if failed:
        raise SystemExit("\n".join([*failed, f"Go on with them by --resume {out}"]))


def missing(config: RunConfig) -> str | None:
    """Why a task cannot be run; None where it can."""
    try:
        task = catalogue.load(config.task, config.data_dir)
        command.check_classes(task)
        command.check_batch(config, task, meshes.make(config.mesh))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return f"{config.task}: {error}"
    return None


def of(
    program: str, presets: command.Presets, suite: str, argv: list[str]
) -> dict[str, Any]:
    """The configs of a suite's tasks that a command line means, by task.

    Args:
      presets: of the suite's tasks, by name.
      suite: its name.
      argv: with `--config` of the suite.

    Raises:
      SystemExit: as `command.parse`, or no such task.
    """
    first = command.parser(program)
    first.add_argument("--config")
    first.add_argument("--tasks", nargs="+", default=list(presets))
    known, rest = first.parse_known_args(argv)
    unknown = [task for task in known.tasks if task not in presets]
    if unknown or any(word.split("=")[0] == "--task" for word in rest):
        raise SystemExit(
            f"{program}: {suite} has no {', '.join(unknown) or '--task'}. --tasks "
            f"takes some of {', '.join(presets)}."
        )
    return {
        task: command.parse(program, presets, ["--config", task, *rest], suite)[1]
        for task in known.tasks
    }
