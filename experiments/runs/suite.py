"""Several tasks of images, each in a run folder of its own, and one table.

They run one after the other. `suite.json` holds the config of every task. A task with a
`summary.json` is finished; the others are resumed or begun. A task whose loss is not
finite does not stop the others.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from experiments import files, paths, terminal
from experiments.config import command_line, run_config
from experiments.config.images import ImageConfig
from experiments.names import unknown
from experiments.pretrained import base_models
from experiments.reports import finished, table
from experiments.runs import folder, images, setup
from experiments.runs.run import RunFailed, run
from experiments.tasks.catalogue import TASK_LIST

FILE = "suite.json"
Presets = command_line.Presets[ImageConfig]


def start(
    program: str, name: str, tasks: Mapping[str, ImageConfig], console: Console
) -> None:
    """Runs a config for every task, into `out/TASK`.

    Args:
      program: name of the command in error messages.
      name: name of the suite; that of its folder if the configs name none.
      tasks: config of each task, by name.

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
    _run_all(tasks, out, console)


def resume(out: Path, console: Console) -> None:
    """Runs what is left of an interrupted suite; errors as `start`."""
    found = files.read(out / FILE)
    tasks = {
        task: command_line.from_values(
            found["program"], values, ImageConfig(), out / FILE
        )
        for task, values in found["tasks"].items()
    }
    setup.join_processes(next(iter(tasks.values())), console)
    _run_all(tasks, out, console)


def _run_all(tasks: Mapping[str, ImageConfig], out: Path, console: Console) -> None:
    failed = []
    for number, (task, config) in enumerate(tasks.items(), start=1):
        place = out / task
        if (place / "summary.json").exists():
            continue
        console.rule(f"{task}, {number} of {len(tasks)}")
        begun = (place / "config.json").exists()
        config = dataclasses.replace(config, out=place)
        try:
            run(images.prepared(task, config, console), resume=begun)
        except (RunFailed, ValueError, ModuleNotFoundError, OSError) as error:
            failed.append(f"{task}: {error}")
            console.print(failed[-1], style="red", soft_wrap=True)
        except SystemExit as stop:
            raise SystemExit(f"{stop}\nThe rest goes on by --resume {out}") from None
        except KeyboardInterrupt:
            raise SystemExit(f"Go on with it by --resume {out}") from None
    if files.is_primary() and len(failed) < len(tasks):
        table.write(table.table(finished.collect([out], console)), out, console)
    if failed:
        raise SystemExit("\n".join([*failed, f"Go on with them by --resume {out}"]))


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
