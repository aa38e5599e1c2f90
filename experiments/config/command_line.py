"""Command lines: a preset, a file or an interrupted run becomes one run or a suite."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar

from experiments import paths
from experiments.config import options
from experiments.config.cluster import Cluster
from experiments.config.options import Option
from experiments.config.presets import SUITES, Preset
from experiments.config.run_config import RunConfig
from experiments.names import guessed, unknown

AnyConfig = TypeVar("AnyConfig", bound=RunConfig)
Presets = Mapping[str, Preset[AnyConfig]]
WORKERS = "workers"  # their panel in the help
SHOWN = 5  # methods whose options the help of a run names


def parser(program: str) -> argparse.ArgumentParser:
    """Returns a parser of the words that choose the others' defaults."""
    return argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)


def interrupted(program: str, argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Returns the folder that `--resume FOLDER` names, and the other words.

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


def spread(program: str, argv: Sequence[str] | None) -> tuple[Cluster, list[str]]:
    """Returns what words say of workers, and the other words, which are the workers'.

    Args:
      program: command, as users call it.
      argv: words after the command; None for the process's own.

    Raises:
      SystemExit: a value does not fit.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if _help(words)[0] is not None:
        return Cluster(), words
    values, rest = options.parse(program, options.of(Cluster(), WORKERS), words)
    cluster = options.replaced(Cluster(), values)
    try:
        cluster.check()
    except ValueError as error:
        raise SystemExit(f"{program}: {error}") from error
    return cluster, rest


def parse(
    program: str,
    presets: Presets[AnyConfig],
    argv: Sequence[str] | None = None,
    suite: str = "",
) -> tuple[str, AnyConfig]:
    """Returns the config's name and the config that a command line means.

    `--config` names a preset or a JSON file with (some) fields of the presets' kind of
    config, such as the `config.json` of an earlier run; other options override single
    fields. `--help` prints the options of a run, `--help METHOD` all those of a method.

    Args:
      program: command, as users call it.
      presets: presets by name, all of one kind.
      argv: words after the command; None for the process's own.
      suite: name that stands for several presets, to list among them.

    Raises:
      SystemExit: after a help; or with a message that names what comes nearest, and
        what lists all, when a preset, file, field or value is none.
    """
    first = parser(program)
    first.add_argument("--config")
    known, words = first.parse_known_args(list(sys.argv[1:] if argv is None else argv))
    asked, words = _help(words)
    if not known.config and asked is None:
        raise SystemExit(
            f"{program}: --config is missing: name a preset, such as "
            f"{next(iter(presets))}, or a file. `{program} --help` lists all."
        )
    name = known.config or next(iter(presets))
    default = _base(program, name, presets, suite)
    chosen = _chosen(program, default, words)
    if asked is not None:
        text = _usage(presets, suite)
        if suite and asked == WORKERS:
            _show_workers(program)
        shown = list(of_run(default, chosen))
        _show(program, default, shown, chosen, asked, text)
    config = _overridden(program, default, chosen, words)
    try:
        config.check()
    except ValueError as error:
        raise SystemExit(f"{program}: {error}") from error
    return Path(name).stem, config


class Study(Protocol):
    """Options of a program that makes many runs; a frozen dataclass.

    Attributes:
      own: fields of `run` that the program sets by itself.
    """

    own: ClassVar[tuple[str, ...]]

    @property
    def run(self) -> RunConfig:
        """Config that all runs share."""
        ...

    def adapted(self) -> tuple[str, ...]:
        """Returns the methods that are run."""
        ...


AnyStudy = TypeVar("AnyStudy", bound=Study)


def parse_study(
    program: str, default: AnyStudy, argv: Sequence[str] | None, text: str
) -> AnyStudy:
    """Returns the options of a program that makes many runs, as the words have them.

    Args:
      program: command, as users call it.
      default: options without any words.
      argv: words after the command; None for the process's own.
      text: description, for the help.

    Raises:
      SystemExit: after a help; or with a message that names what comes nearest.
    """
    asked, words = _help(list(sys.argv[1:] if argv is None else argv))
    own = list(options.of(default, "study", skip=("run",)))
    values, words = options.parse(program, own, words)
    study = options.replaced(default, values)
    methods = study.adapted()
    _check_methods(program, default.run, methods)
    found = [
        dataclasses.replace(o, hidden=o.hidden or o.flag[4:] in default.own)
        for o in of_run(default.run, methods, "run.")
    ]
    if asked == WORKERS:
        _show_workers(program)
    if asked is not None:
        own += options.of(Cluster(), WORKERS)
        _show(program, default.run, [*own, *found], methods, asked, text, "run.")
    values, rest = options.parse(program, found, words)
    if rest:
        raise _refused(program, default.run, rest, [*own, *found], methods, "run.")
    return dataclasses.replace(study, run=_rebuilt(default.run, values, "run."))


def from_values(
    program: str, values: dict[str, Any], usual: AnyConfig, file: Path
) -> AnyConfig:
    """Returns the config that `run_config.as_dict` made JSON of.

    Args:
      program: command, as users call it.
      values: content of the file.
      usual: config of its kind with the values of the fields that are not there.
      file: for messages.

    Raises:
      SystemExit: there are no such fields, which are all named, or a value does not
        fit.
    """
    values = dict(values)
    source = str(values.pop("source", usual.source))
    words = dict(_flags(values))
    known = {option.flag for option in of_run(usual, usual.names())}
    if foreign := [name for name in words if name not in known]:
        raise SystemExit(
            f"{program}: {file} has fields that no option is called: "
            f"{', '.join(guessed(foreign, known))}. `{program} --help` lists all."
        )
    flat = [word for own in words.values() for word in own]
    config = _overridden(program, usual, usual.names(), flat)
    return dataclasses.replace(config, source=source)


def of_run(
    config: RunConfig, methods: Collection[str], prefix: str = ""
) -> Iterator[Option]:
    """Yields the options of a run with some methods, which have the config's values."""
    for panel, cls in config.panels.items():
        yield from options.of(config, panel, prefix, cls=cls)
    for name in methods:
        own = config.method(name)
        yield from options.of(own, name, f"{prefix}{name}.", own.knobs)


def _overridden(
    program: str, config: AnyConfig, methods: Collection[str], words: list[str]
) -> AnyConfig:
    own = list(of_run(config, methods))
    values, rest = options.parse(program, own, words)
    if rest:
        raise _refused(program, config, rest, own, methods)
    return _rebuilt(config, values)


def _rebuilt(
    config: AnyConfig, values: Mapping[str, Any], prefix: str = ""
) -> AnyConfig:
    settings = {
        name: options.replaced(own, values, f"{prefix}{name}.")
        for name, own in config.settings.items()
    }
    return options.replaced(config, values, prefix).with_settings(**settings)


def _base(
    program: str, name: str, presets: Presets[AnyConfig], suite: str
) -> AnyConfig:
    """Returns the preset of that name, or the config in that file."""
    if name in presets:
        return dataclasses.replace(presets[name].config)
    path = paths.at_home(name)
    if not os.path.isfile(path):
        names = [*presets, suite] if suite else list(presets)
        text = unknown("preset or file", name, names, f"{program} --help")
        raise SystemExit(f"{program}: {text}")
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise SystemExit(f"{program}: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise SystemExit(f"{program}: {path} holds no JSON object of fields.")
    return from_values(program, values, type(_some(presets))(), path)


def _some(presets: Presets[AnyConfig]) -> AnyConfig:
    return next(iter(presets.values())).config


def _flags(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yields the fields of JSON, dots for fields of fields, each with its words."""
    for name, value in values.items():
        match value:
            case dict():
                yield from _flags(value, f"{prefix}{name}.")
            case bool():
                yield f"{prefix}{name}", [f"--{prefix}{'' if value else 'no_'}{name}"]
            case list() | tuple():
                yield f"{prefix}{name}", [f"--{prefix}{name}", *map(str, value)]
            case _:  # which may begin with a dash
                yield f"{prefix}{name}", [f"--{prefix}{name}={value}"]


def _chosen(program: str, usual: RunConfig, words: list[str]) -> list[str]:
    """Returns the methods that the words choose."""
    first = parser(program)
    first.add_argument("--methods", nargs="*", default=list(usual.methods))
    chosen = first.parse_known_args(words)[0].methods
    _check_methods(program, usual, chosen)
    return list(dict.fromkeys(chosen))


def _check_methods(program: str, usual: RunConfig, methods: Collection[str]) -> None:
    for name in methods:
        if name not in usual.names():
            raise SystemExit(f"{program}: {usual.no_method(name, program)}")


def _refused(
    program: str,
    config: RunConfig,
    words: list[str],
    known: Sequence[Option],
    methods: Collection[str],
    prefix: str = "",
) -> SystemExit:
    """Returns the error about words that are no option."""
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not flags:
        return SystemExit(f"{program}: {' '.join(words)} belongs to no option.")
    flag = flags[0].lstrip("-").replace("-", "_")
    method, dot, _ = flag.removeprefix(prefix).partition(".")
    if dot and method in config.names() and method not in methods:
        return SystemExit(
            f"{program}: --{flag} is an option of {method}, which is not among "
            f"--methods {' '.join(methods)}: add it there, or leave the option out."
        )
    where = f"{program} --help" + (f" {method}" if dot and method in methods else "")
    text = unknown("option", f"--{flag}", [f"--{o.flag}" for o in known], where)
    return SystemExit(f"{program}: {text}")


# Help


def _help(words: list[str]) -> tuple[str | None, list[str]]:
    """Returns the method that `--help` is asked of, and the other words.

    It is "" where `--help` names none, and None without `--help`.
    """
    for index, word in enumerate(words):
        if word in ("-h", "--help"):
            after = [w for w in words[index + 1 : index + 2] if not w.startswith("-")]
            rest = words[:index] + words[index + 1 + len(after) :]
            return (after or [""])[0], rest
    return None, words


def _show(
    program: str,
    config: RunConfig,
    known: list[Option],
    methods: Collection[str],
    asked: str,
    text: str,
    prefix: str = "",
) -> None:
    """Prints the help of a method, or of the run without the methods' options.

    Raises:
      SystemExit: afterwards.
    """
    if asked:
        _check_methods(program, config, [asked])
        own = config.method(asked)
        found = options.of(own, asked, f"{prefix}{asked}.")
        title = f"{own.title}. {type(own).__doc__}"
        options.show(f"{program} --methods {asked}", found, title)
    else:
        lines = [text]
        lines += [
            f"--help METHOD: all options of one of {', '.join(config.names())}. The "
            "usual ones ([X]: the default):"
        ]
        if len(methods) > SHOWN:
            lines += [f"  --{prefix}METHOD.lr, for instance"]
        for name in methods if len(methods) <= SHOWN else ():
            own = [o.flag.rpartition(".")[2] for o in known
                   if o.panel == name and not o.hidden]  # fmt: skip
            lines += [f"  --{prefix}{name}.{' .'.join(own)}"] * bool(own)
        rest = [o for o in known if o.panel not in methods]
        options.show(program, rest, "\n".join(lines), brief=True)
    raise SystemExit(0)


def _show_workers(program: str) -> NoReturn:
    """Prints the help of the workers' options, and exits."""
    text = f"{Cluster.__doc__} A worker that dies or is stopped loses nothing."
    options.show(program, options.of(Cluster(), WORKERS), text)
    raise SystemExit(0)


def _usage(presets: Presets, suite: str) -> str:
    """Returns how a run begins or goes on, and the names of the presets."""
    texts: dict[str, list[str]] = {}
    benchmark = SUITES.get(suite, ())
    for name, preset in presets.items():
        if name not in benchmark:
            texts.setdefault(preset.text, []).append(name)
    groups = [f"{', '.join(names)} ({text})" for text, names in texts.items()]
    if benchmark:
        groups.append(f"{suite}, or its tasks, as {benchmark[0]}")
    return (
        "--config NAME or FILE: a preset, or JSON such as a run's config.json. "
        f"Presets: {'; '.join(groups)}. "
        "--resume FOLDER: resumes a run."
        + f" --help {WORKERS}: in parallel. --suggest: advice."
        * bool(suite)
    )
