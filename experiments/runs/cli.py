"""The command line of a kind of run: parse, then run."""

import itertools
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console

from experiments import terminal
from experiments.config import command_line
from experiments.config.presets import SUITES
from experiments.config.run_config import RunConfig
from experiments.runs import setup, suite
from experiments.runs.run import run
from experiments.runs.setup import Prepared


def main(
    program: str,
    presets: command_line.Presets[Any],
    prepare: Callable[[str, Any, Console], Prepared],
    argv: list[str] | None,
    suite_name: str = "",
) -> dict[str, Any] | None:
    """Parses the command line and runs; returns the content of a run's `summary.json`.

    Args:
      program: name of the command in error messages.
      presets: presets that `--config` may name, all of one kind of run.
      prepare: makes a run of that kind, of the config's name and the config.
      argv: words after the program's name; None for those of the process.
      suite_name: name of the suite of all tasks of a benchmark of images, if any.

    Raises:
      SystemExit: an option is wrong, an input is missing, or a run failed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    console = terminal.console()
    resumed, words = command_line.interrupted(program, words)
    if resumed is not None and suite_name and (resumed / suite.FILE).exists():
        return suite.resume(resumed, console)
    if resumed is not None:
        here = resumed.absolute()  # one called ~ or None would be taken for another
        words = [f"--config={here / 'config.json'}", f"--out={here}"]
    elif suite_name and _names(words, suite_name):
        tasks = {name: presets[name] for name in SUITES[suite_name]}
        found = suite.configs(program, tasks, suite_name, words)
        _check_length(program, words, next(iter(found.values())))
        setup.join_processes(next(iter(found.values())), console)
        return suite.start(program, suite_name, found, console)
    name, config = command_line.parse(program, presets, words, suite_name)
    _check_length(program, words, config)
    setup.join_processes(config, console)
    with terminal.exit_on_error(program):
        prepared = prepare(name, config, console)
    return run(prepared, resume=resumed is not None)


def _check_length(program: str, words: list[str], config: RunConfig) -> None:
    """Exits where `--epochs` would be ignored."""
    given = {word.split("=")[0] for word in words}
    if "--epochs" in given and config.steps is not None:
        raise SystemExit(
            f"{program}: --epochs and --steps both give a run's length, expected one. "
            "(--steps None: not that of the preset.)"
        )


def _names(words: list[str], suite_name: str) -> bool:
    pairs = itertools.pairwise(words)
    return ("--config", suite_name) in pairs or f"--config={suite_name}" in words
