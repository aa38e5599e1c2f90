"""The command line of a kind of run: parse, then run."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from experiments import terminal
from experiments.config import command_line
from experiments.config.cluster import Cluster
from experiments.config.images import ImageConfig
from experiments.config.presets import SUITES
from experiments.config.run_config import RunConfig
from experiments.runs import cluster, setup, suite
from experiments.runs.run import run
from experiments.runs.setup import Prepared

OF_SEARCHES = {
    *("--search_epochs", "--search_steps"),
    *(f"--grid.{name}" for name in ("lr_factors", "weight_decays", "densities")),
}


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
    console, workers = terminal.console(), Cluster()
    if suite_name:
        workers, words = command_line.spread(program, words)
        with terminal.exit_on_error(program):
            cluster.prepare(workers)
    resumed, words = command_line.interrupted(program, words)
    if resumed is not None and suite_name and (resumed / suite.FILE).exists():
        return suite.resume(resumed, console, workers)
    if resumed is not None and workers.is_used:
        raise SystemExit(
            f"{program}: {resumed} is a run of one process, expected a suite or what "
            "began with --cluster. Without it, the run goes on."
        )
    if resumed is not None:
        here = resumed.absolute()  # one called ~ or None would be taken for another
        words = [f"--config={here / 'config.json'}", f"--out={here}"]
    elif suite_name and _names(words, suite_name):
        tasks = {name: presets[name] for name in SUITES[suite_name]}
        found = suite.configs(program, tasks, suite_name, words)
        _check_read(program, words, next(iter(found.values())))
        return _start(program, suite_name, found, console, workers)
    name, config = command_line.parse(program, presets, words, suite_name)
    _check_read(program, words, config)
    if workers.is_used:  # which share the methods
        own = {m: dataclasses.replace(config, methods=(m,)) for m in config.methods}
        return _start(program, name, own, console, workers)
    setup.join_processes(config, console)
    with terminal.exit_on_error(program):
        prepared = prepare(name, config, console)
    return run(prepared, resume=resumed is not None)


def _start(
    program: str,
    name: str,
    runs: Mapping[str, ImageConfig],
    console: Console,
    workers: Cluster,
) -> None:
    """Begins several runs, by workers or in this process."""
    some = next(iter(runs.values()))
    if some.distributed and workers.is_used:
        raise SystemExit(
            f"{program}: --distributed is for one run by several processes, and each "
            "worker of --cluster is a process with runs of its own: expected one of "
            "the two."
        )
    setup.join_processes(some, console)
    suite.start(program, name, runs, console, workers)


def _check_read(program: str, words: list[str], config: RunConfig) -> None:
    """Exits where a word would be ignored."""
    given = {word.split("=")[0] for word in words}
    if (unread := sorted(given & OF_SEARCHES)) and not config.search:
        raise SystemExit(
            f"{program}: {', '.join(unread)}: a search alone reads it. Add --search."
        )
    if "--epochs" in given and config.steps is not None:
        raise SystemExit(
            f"{program}: --epochs and --steps both give a run's length, expected one. "
            "(--steps None: not that of the preset.)"
        )


def _names(words: list[str], suite_name: str) -> bool:
    pairs = itertools.pairwise(words)
    return ("--config", suite_name) in pairs or f"--config={suite_name}" in words
