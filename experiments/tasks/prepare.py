"""Downloads a TFDS data set and prepares it for reading by index.

    pip install -e ".[prepare]" && python -m experiments.tasks.prepare --task cifar100

Writes the set into `--data_dir` as ArrayRecord files. This is the only command that
needs TensorFlow; reading the files does not.
"""

import dataclasses
import importlib.util
from pathlib import Path

import tensorflow_datasets as tfds
import tyro

from experiments import terminal
from experiments.data.tfds import FORMAT, Builder
from experiments.paths import Given, at_home
from experiments.tasks import catalogue, fgvc, vtab


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Options of `python -m experiments.tasks.prepare`."""

    task: tuple[str, ...] = ()
    """Tasks of VTAB-1k or FGVC, as `python -m experiments.tasks.show --list` prints."""
    data_dir: Path = catalogue.DATA_DIR
    """Folder for the prepared sets."""
    manual_dir: Given | None = None
    """Folder with the files that have to be downloaded by hand. Default:
    DATA_DIR/downloads/manual."""


def main(argv: list[str] | None = None) -> None:
    """Prepares one data set after the other."""
    program = "python -m experiments.tasks.prepare"
    config = tyro.cli(PrepareConfig, prog=program, args=argv, description=__doc__)
    try:
        builders = _builders(config)
        if importlib.util.find_spec("tensorflow") is None:
            raise ModuleNotFoundError(
                'preparing needs TensorFlow: pip install -e ".[prepare]"'
            )
        for builder in builders:
            prepare(builder, at_home(config.data_dir), config.manual_dir)
    except (ValueError, AssertionError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"{program}: {error}") from error
    terminal.console().print(f"Everything is in {config.data_dir}", soft_wrap=True)


def prepare(builder: Builder, data_dir: Path, manual_dir: Path | None = None) -> None:
    """Downloads and prepares the newest version that our tables were checked with."""
    name = f"{builder.name}:{builder.versions[-1]}"
    made = tfds.builder(name, data_dir=data_dir, file_format=FORMAT)
    made.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
    )


def _builders(config: PrepareConfig) -> list[Builder]:
    tasks = {name: row.builder for name, row in (vtab.TASKS | fgvc.TASKS).items()}
    known = ", ".join(name for name, builder in tasks.items() if builder)
    if not config.task:
        raise ValueError(f"--task is missing: expected {known}.")
    builders = {}
    for task in config.task:
        if task not in tasks:
            raise ValueError(f"{task!r} is no task of TFDS: expected {known}.")
        builder = tasks[task]
        if builder is None:
            raise ValueError(
                f"TFDS cannot get {task}: unpack {fgvc.TASKS[task].archive} in "
                f"{config.data_dir / task}."
            )
        builders[builder.name] = builder
    return list(builders.values())


if __name__ == "__main__":
    main()
