"""The command line of `experiments.vtab` and `experiments.fgvc`: parse, then run."""

import itertools
import sys
from typing import Any

from experiments import terminal
from experiments.config import command_line
from experiments.config.presets import SUITES
from experiments.runs import setup, suite
from experiments.runs.run import run


def main(
    program: str, presets: command_line.Presets, suite_name: str, argv: list[str] | None
) -> dict[str, Any] | None:
    """Parses the command line and runs; returns the content of a run's `summary.json`.

    Args:
      program: name of the command in error messages.
      presets: presets that `--config` may name.
      suite_name: name of the suite of all tasks of a benchmark.
      argv: words after the program's name; None for those of the process.

    Raises:
      SystemExit: an option is wrong, an input is missing, or a run failed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    console = terminal.console()
    if {"--epochs", "--steps"} <= {word.split("=")[0] for word in words}:
        raise SystemExit(
            f"{program}: --epochs and --steps both give a run's length, expected one."
        )
    resumed, words = command_line.interrupted(program, words)
    if resumed is not None and (resumed / suite.FILE).exists():
        return suite.resume(resumed, console)
    if resumed is not None:
        here = resumed.absolute()  # one called ~ or None would be taken for another
        words = [f"--config={here / 'config.json'}", f"--out={here}"]
    elif _names(words, suite_name):
        tasks = {name: presets[name] for name in SUITES[suite_name]}
        found = suite.configs(program, tasks, suite_name, words)
        setup.join_processes(next(iter(found.values())), console)
        return suite.start(program, suite_name, found, console)
    name, config = command_line.parse(program, presets, words, suite_name)
    setup.join_processes(config, console)
    with terminal.exit_on_error(program):
        setting = setup.prepared(name, config, console)
    return run(setting, resume=resumed is not None)


def _names(words: list[str], suite_name: str) -> bool:
    pairs = itertools.pairwise(words)
    return ("--config", suite_name) in pairs or f"--config={suite_name}" in words
