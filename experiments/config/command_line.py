"""Command lines: a preset, a file or an interrupted run becomes one run or a suite."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from experiments import paths
from experiments.config.presets import Preset
from experiments.config.run_config import RunConfig

Presets = Mapping[str, Preset]


def parser(program: str) -> argparse.ArgumentParser:
    """For the words that choose the others' defaults; leaves the rest alone."""
    return argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)


def interrupted(program: str, argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """What `--resume FOLDER` names, and the other words.

    Raises:
      SystemExit: it does not stand alone, or is no run's folder.
    """
    first = parser(program)
    first.add_argument("--resume", type=paths.at_home)
    known, rest = first.parse_known_args(list(argv))
    out = known.resume
    files = ("config.json", "suite.json")
    if out is not None and (
        rest or not any(os.path.isfile(out / name) for name in files)
    ):
        raise SystemExit(
            f"{program}: --resume FOLDER stands alone, and FOLDER is that of an "
            "interrupted run, with its config.json or suite.json."
        )
    return out, rest


def parse(
    program: str, presets: Presets, argv: Sequence[str] | None = None, suite: str = ""
) -> tuple[str, RunConfig]:
    """The config's name and the config that a command line means.

    `--config` names a preset or a JSON file with (some) fields of `RunConfig`, such as
    the `config.json` of an earlier run; other options override single fields.

    Args:
      program: as users call it.
      presets: by name.
      argv: the words after it.
      suite: a name that stands for several presets, to list among the choices.

    Raises:
      SystemExit: with a message that lists what is valid, when a preset, file, field or
        value is none.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = parser(program)
    first.add_argument("--config")
    known, rest = first.parse_known_args(argv)
    wants_help = "--help" in rest or "-h" in rest
    choices = _choices(presets, suite)
    if not known.config and not wants_help:
        raise SystemExit(f"{program}: --config is missing. {choices}")
    name = known.config or next(iter(presets))
    default, from_file = _base(program, name, presets, choices)
    config, unknown = tyro.cli(
        RunConfig,
        prog=f"{program} --config {name}",
        description=f"--config NAME or FILE. {choices}. Alone, --resume FOLDER goes "
        "on with an interrupted run.",
        default=default,
        args=[*from_file, *rest],
        return_unknown_args=True,
    )
    if unknown:
        raise SystemExit(
            f"{program}: no field is called {' '.join(unknown)}. There are: "
            + ", ".join(f"--{field}" for field in _fields(RunConfig()))
        )
    try:
        config.check()
    except ValueError as error:
        raise SystemExit(f"{program}: {error}") from error
    return Path(name).stem, config


def from_values(program: str, values: dict[str, Any]) -> RunConfig:
    """The config that `config.as_dict` made JSON of."""
    words = [word for pair in _flags(values) for word in pair]
    return tyro.cli(RunConfig, prog=program, args=words)


def _base(
    program: str, name: str, presets: Presets, choices: str
) -> tuple[RunConfig, list[str]]:
    """The preset of that name, or the defaults and the flags that a file stands for."""
    if name in presets:
        return presets[name].config, []
    path = paths.at_home(name)
    if not os.path.isfile(path):
        raise SystemExit(f"{program}: no preset or file is called {name!r}. {choices}")
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise SystemExit(f"{program}: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise SystemExit(f"{program}: {path} holds no JSON object of fields.")
    return RunConfig(), [word for pair in _flags(values) for word in pair]


def _flags(values: dict[str, Any], prefix: str = "") -> Iterator[list[str]]:
    for name, value in values.items():
        match value:
            case dict():
                yield from _flags(value, f"{prefix}{name}.")
            case bool():
                yield [f"--{prefix}{'' if value else 'no_'}{name}"]
            case list() | tuple():
                yield [f"--{prefix}{name}", *map(str, value)]
            case _:  # which may begin with a dash
                yield [f"--{prefix}{name}={value}"]


def _fields(config: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _choices(presets: Presets, suite: str) -> str:
    texts: dict[str, list[str]] = {}
    for name, preset in presets.items():
        texts.setdefault(preset.text, []).append(name)
    groups = [f"{', '.join(names)} ({text})" for text, names in texts.items()]
    groups += [f"{suite} (the benchmark, or --tasks of it)"] * bool(suite)
    return "Presets: " + "; ".join(groups)
