"""Teaches the toy single concepts by LoRA and SNELLA, and compares their pictures.

    python -m experiments.studies.personalise --data_dir DATA --out runs/personalise

The concepts are five families of emoji that the toy has never seen and five of
DreamBooth's subjects (in `DATA/dreambooth`), at 32 pixels. Each method's rate is that
of four with the highest sum of image alignment and probe, on average over a sixth
family and a sixth subject (seed 0). Then every method learns every concept with three
seeds, and SNELLA all 30 subjects for half as long, of which the files of differences
stay in `deltas/`. `results.json` in `--out` keeps what is finished: the same command
goes on with the rest. Writes `report.md`, `report.json` and `sheet.png`.

What is measured: image alignment and Vendi in a ViT-S/14, and a probe of emoji's
subcategories in place of CLIP; see `experiments.pretrained.toy_judges`.
"""

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from PIL import Image
from rich.console import Console

from experiments import files, paths, terminal
from experiments.config import run_config
from experiments.config.dreambooth import TOY, DreamboothConfig
from experiments.methods.registry import UNTUNED
from experiments.paths import Given
from experiments.runs import cells, dreambooth
from experiments.runs.run import complete
from experiments.studies import personalise_report, table_store
from experiments.studies.table_store import Done, Store
from experiments.tasks import emoji
from experiments.tasks.catalogue import DATA_DIR
from experiments.tasks.dreambooth import SUBJECTS
from experiments.tasks.emoji_captions import WHITE
from snella_jax.files.atomic import whole_file

PROGRAM = "python -m experiments.studies.personalise"
METHODS = ("lora", "snella", "snella_linear")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
FAMILIES = ("cat_face", "clock_face", "wise_monkey", "mailbox", "closed_book")
PHOTOGRAPHED = ("dog", "cat", "teapot", "candle", "fancy_boot")
SEARCHED = ("moon_face", "berry_bowl")  # to choose rates, in no table
LIVE = ("cat_face", "wise_monkey")
SEEDS = (0, 1, 2)
OF_DELTAS, ROW = "snella", "deltas"  # method and row of the 30 subjects
CRITERION = ("test_image_alignment", "test_probe")  # whose sum decides on a rate
# Fields of a config that only say where things are, or what a cell decides.
OWN = ("subject", "data_dir", "class_name", "kind", "seed", "out", "methods", "source")


@dataclasses.dataclass(frozen=True)
class Personalise:
    """Options of `python -m experiments.studies.personalise`."""

    out: Given = Path("runs/personalise")
    """Folder for the results."""
    data_dir: Given = DATA_DIR
    """Folder that has DreamBooth's subjects in dreambooth/."""
    emoji: Given = emoji.FOLDER
    """Folder of the unpacked package emoji-datasource-twitter."""
    table_only: bool = False
    """Run nothing; write the table of what is finished."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """Runs that differ in their seeds.

    Attributes:
      concept: a family of emoji or a subject.
      method: name in `METHODS`, or `untuned`.
      row: name in `results.json`.
      rate: learning rate; None for the one that was chosen.
      seeds: seeds of the runs.
      length: updates, in those of the preset.
    """

    concept: str
    method: str
    row: str
    rate: float | None = None
    seeds: tuple[int, ...] = SEEDS
    length: float = 1.0


def main(argv: list[str] | None = None) -> None:
    """Runs what is left, and writes the table."""
    study = tyro.cli(Personalise, prog=PROGRAM, args=argv, description=__doc__)
    console = terminal.console()
    with terminal.exit_on_error(PROGRAM):
        paths.check_out(study.out)
        shared = _shared()
        store = Store(study.out, shared, shared)
        if not study.table_only:
            _write_families(study)
    left = () if study.table_only else (*_search(), *_table(), *_deltas())
    own = {store.cell(cell.concept, cell.row): cell for cell in left}

    def tried(cell: cells.Cell) -> str | None:
        return _tried(own[cell], study, store, console)

    failed = cells.work(study.out, list(own), tried, console)
    with store.locked():
        made = personalise_report.made(store, (*FAMILIES, *PHOTOGRAPHED), chosen(store))
        personalise_report.write(made, study.out, console)
    if failed:
        sys.exit("\n".join(failed))


def _shared() -> dict[str, Any]:
    """Returns the settings that all runs share."""
    fields = run_config.as_dict(TOY)
    return {name: value for name, value in fields.items() if name not in OWN}


def _search() -> Iterator[Cell]:
    for concept in SEARCHED:
        for method in METHODS:
            for rate in RATES:
                yield Cell(concept, method, row_of(method, rate), rate, SEEDS[:1])


def _table() -> Iterator[Cell]:
    for concept in (*FAMILIES, *PHOTOGRAPHED):
        yield Cell(concept, UNTUNED, UNTUNED, 0.0, SEEDS[:1])
        for method in METHODS:
            yield Cell(concept, method, method)


def _deltas() -> Iterator[Cell]:
    for subject in SUBJECTS:
        yield Cell(subject, OF_DELTAS, ROW, seeds=SEEDS[:1], length=0.5)


def row_of(method: str, rate: float) -> str:
    """Returns the row of a trial of the search."""
    return f"{method}@{rate:g}"


def chosen(store: Store) -> dict[str, dict[str, Any]]:
    """Returns `trials`, the criterion by rate, and `rate`, the best one, by method.

    A method of which a trial is missing is not there; of equal rates the lowest is
    taken.
    """
    found = {}
    for method in METHODS:
        trials = {}
        for rate in RATES:
            own = [store.rows(name).get(row_of(method, rate)) for name in SEARCHED]
            seeds = [(one or {}).get("seeds", {}).get("0") for one in own]
            if all(seeds):
                total = sum(one[name] for one in seeds if one for name in CRITERION)
                trials[rate] = total / len(SEARCHED)
        if len(trials) == len(RATES):
            found[method] = {
                "trials": {f"{rate:g}": round(x, 4) for rate, x in trials.items()},
                "rate": max(trials, key=lambda rate: trials[rate]),
            }
    return found


def _tried(
    cell: Cell, study: Personalise, store: Store, console: Console
) -> str | None:
    """Completes a cell; returns what failed."""

    def rate(_: Path) -> Done:
        if cell.rate is not None:
            return {"chosen": {"lr": cell.rate}}
        known = chosen(store)
        if cell.method not in known:
            raise RuntimeError(f"a trial of {cell.method} is missing, so its rate, too")
        return {"chosen": {"lr": known[cell.method]["rate"]}}

    def train(out: Path, seed: int, settings: Done) -> Done:
        config = _config(cell, study, seed, settings["lr"])
        config = dataclasses.replace(config, out=out)
        prepared = dreambooth.prepared(cell.concept, config, console)
        store.begin(f"{cell.concept}, seed {seed}", prepared.inputs, console)
        summary = complete(prepared, resume=(out / "config.json").exists())
        if cell.row == ROW:
            _keep_delta(out, study.out / "deltas" / f"{cell.concept}.safetensors")
        where = {name: summary[name] for name in ("device", "versions")}
        return summary["methods"][cell.method] | where

    names = cell.concept, cell.row
    return table_store.attempt(PROGRAM, store, names, cell.seeds, rate, train, console)


def _config(cell: Cell, study: Personalise, seed: int, rate: float) -> DreamboothConfig:
    """Returns the config of a run."""
    steps = TOY.steps and round(cell.length * TOY.steps)
    changes: dict[str, Any] = {"subject": cell.concept}
    if cell.concept in emoji.FAMILIES:
        changes["subject"] = str(_folder(study, cell.concept))
        changes["class_name"] = emoji.FAMILIES[cell.concept].class_name
        changes["kind"] = "live" if cell.concept in LIVE else "object"
    config = dataclasses.replace(
        TOY,
        methods=(cell.method,),
        seed=seed,
        steps=steps,
        data_dir=study.data_dir,
        **changes,
    )
    if cell.method == UNTUNED:
        return config
    settings = dataclasses.replace(config.settings[cell.method], lr=rate)
    return config.with_settings(**{cell.method: settings})


def _folder(study: Personalise, family: str) -> Path:
    return study.out / "emoji" / family


def _write_families(study: Personalise) -> None:
    """Writes the pictures of the families, as photographs are given."""
    found = emoji.read(study.emoji)
    for family in emoji.FAMILIES:
        own = [one for one in found if one.family == family]
        folder = _folder(study, family)
        folder.mkdir(parents=True, exist_ok=True)
        drawn = emoji.on(emoji.pictures(own), WHITE)
        for number, picture in enumerate(drawn):
            with whole_file(folder / f"{number:02d}.png") as new:
                Image.fromarray(picture).save(new, "PNG")


def _keep_delta(out: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    made = out / files.read(out / "results.json")[OF_DELTAS]["delta"]
    with whole_file(kept) as new:
        shutil.copyfile(made, new)


if __name__ == "__main__":
    main()
