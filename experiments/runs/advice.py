"""What to start with for a task, a model and a device, each with where it comes from.

    python -m experiments.vtab --suggest --task FOLDER --model FILE --device_memory 16

prints method, rates, rank, density and memory, and trains nothing. `--keep_abilities`
says that what the model can do already matters. Memory is that of a compiled ViT-B/16,
scaled by the numbers of weights and of the blocks' outputs.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments import files, terminal
from experiments.config import command_line
from experiments.config.images import ImageConfig
from experiments.pretrained import base_models
from experiments.runs import images

FLAG = "--suggest"
MEASURED = Path(__file__).parents[1] / "results" / "memory"
# Of the ViT-B/16 that was compiled: outputs of its blocks, batch 64 at 224 px.
OUTPUTS = 64 * 197 * 768 * 12
GIB = 2**30
COMPILED = {  # by what gives it: the folder, and its rows' sketch
    "": ("h100_vit_b16_batch64_sketch4", 1),
    "--memory lean": ("h100_vit_b16_batch64_lean", 1),
    "--memory lean --activation gelu2 --snella.sketch 4": (
        "h100_vit_b16_batch64_sketch4_lean_gelu2",
        4,
    ),
}


@dataclasses.dataclass(frozen=True)
class Situation:
    """What advice depends on.

    Attributes:
      examples: images to train on.
      classes: number of classes.
      weights: numbers of the model.
      width: width of its tokens; None of models without one.
      outputs: numbers of the blocks' outputs for a batch; None as `width`.
      half: True to compute in 16 bits.
      device: GiB of the device; None if that was not said.
      keep_abilities: what the model can do already matters.
    """

    examples: int
    classes: int
    weights: int
    width: int | None
    outputs: int | None
    half: bool = False
    device: float | None = None
    keep_abilities: bool = False


@dataclasses.dataclass(frozen=True)
class Advice:
    """A suggestion.

    Attributes:
      topic: what it is about.
      text: what to do, and why.
      source: page and section of the docs with the rows that say so.
    """

    topic: str
    text: str
    source: str


def advised(situation: Situation) -> list[Advice]:
    """Returns what to start with.

    >>> small = Situation(800, 10, 22_000_000, 384, None)
    >>> [own.topic for own in advised(small)]
    ['method', 'rates', 'rank', 'density', 'test', 'memory']
    """
    found = [_method(situation), _rates(situation)]
    found += [
        Advice("rank", "8: 4 to 32 differed by less than seeds.", "ablations.md"),
        Advice(
            "density",
            "0.3, the best of 0.1, 0.3 and 0.6 on validation of three tasks; search it "
            "by --search.",
            "choosing.md#rate-rank-and-density",
        ),
        Advice(
            "test",
            f"{situation.examples} images of {situation.classes} classes: compare "
            "methods by several --seed, and rates by --search.",
            "choosing.md#what-a-difference-is-worth",
        ),
    ]
    return [*found, _memory(situation)]


def _method(situation: Situation) -> Advice:
    if situation.keep_abilities:
        text = (
            "snell or snella at --snella.target_density 0.1, or dora: they disturbed a "
            "language model least, in a comparison of two seeds. Measure it on what "
            "your model has to keep (experiments.studies.sparsity)."
        )
        return Advice("method", text, "choosing.md#what-the-model-could-do-before")
    text = (
        "bias and lora first. snella where both leave something to gain, or only a "
        "share of the weights may move: it has not been ahead of lora by more than "
        "the spread on any task here."
    )
    return Advice("method", text, "choosing.md#method")


def _rates(situation: Situation) -> Advice:
    width = situation.width
    if width is not None and width < 384:
        usual = "2e-2 for snella, 1e-2 for lora: those of the quickstart's small ViT"
    elif width is not None and width == 384:
        usual = "9e-3 for snella, 1e-3 for lora, 3e-3 for bias, 3e-5 for full"
    else:
        usual = (
            "3e-3 for snella, 1e-3 for lora and bias, 3e-5 for full: a guess, as only "
            "smaller models were searched"
        )
    text = f"{usual}. Search each by itself: at 3 times its best, snella was at chance."
    return Advice("rates", text, "choosing.md#rate-rank-and-density")


def gib(situation: Situation, method: str, options: str = "") -> float:
    """Returns about how many GiB a training step takes, with AdamW.

    Args:
      method: `lora`, `snella`, or `full` without options.
      options: a key of `COMPILED`.

    Raises:
      ValueError: the model has no tokens of one width.
    """
    if situation.outputs is None:
        raise ValueError("only memory of models with tokens of one width is scaled.")
    folder, sketch = COMPILED[options]
    rows = files.read(MEASURED / folder / "memory.json")
    (row,) = (r for r in rows if r["method"] == method and r["sketch"] == sketch)
    weights = row["argument_bytes"] * situation.weights / row["parameters"]
    temporary = row["temporary_bytes"] * situation.outputs / OUTPUTS
    if not situation.half:  # what was compiled is; full keeps its weights in 32
        weights *= 1 if method == "full" else 2
        temporary *= 2
    return (weights + temporary) / GIB


def _memory(situation: Situation) -> Advice:
    source = "performance.md#below-lora"
    if situation.outputs is None:
        text = "measure it: python -m experiments.benchmarks.memory --model NAME"
        return Advice("memory", text, "performance.md#memory")
    usual = {m: gib(situation, m) for m in ("full", "lora", "snella")}
    text = "about " + ", ".join(f"{size:.2g} GiB for {m}" for m, size in usual.items())
    if situation.device is None:
        return Advice("memory", f"{text}; --device_memory says what fits.", source)
    for options in COMPILED:
        size = gib(situation, "snella", options)
        if size <= 0.9 * situation.device:  # some is taken by the runtime
            how = f"with {options} ({size:.2g} GiB)" if options else "as it comes"
            return Advice("memory", f"{text}; snella fits {how}.", source)
    text += (
        f"; no option fits {situation.device:g} GiB: a smaller --batch, --accumulate"
    )
    return Advice("memory", f"{text} or --dtype bfloat16.", source)


def asked(
    program: str, argv: Sequence[str]
) -> tuple[argparse.Namespace | None, list[str]]:
    """Returns what words ask for advice, None without `--suggest`, and the others."""
    first = command_line.parser(program)
    first.add_argument(FLAG, action="store_true")
    first.add_argument("--device_memory", type=float)
    first.add_argument("--keep_abilities", action="store_true")
    known, rest = first.parse_known_args(list(argv))
    if known.suggest:
        return known, rest
    if known.device_memory is not None or known.keep_abilities:
        raise SystemExit(
            f"{program}: --device_memory and --keep_abilities are of {FLAG}: add it."
        )
    return None, rest


def of_run(config: ImageConfig, known: argparse.Namespace) -> Situation:
    """Returns the situation of a run, whose task and model are loaded.

    Raises:
      ValueError, OSError, ModuleNotFoundError: as in `images.prepared`.
    """
    task = images.loaded(config)
    base: Any = base_models.load(config, task.classes)
    shape = base.config
    width = getattr(shape, "width", None)
    tokens = shape.grid[0] * shape.grid[1] + 1 if width is not None else 0
    sizes = [np.size(x) for x in jax.tree.leaves(nnx.state(base, nnx.Param))]
    return Situation(
        examples=len(task.full if config.trains_on_all else task.train),
        classes=task.classes,
        weights=sum(sizes),
        width=width,
        outputs=config.batch * tokens * width * shape.depth if width else None,
        half=config.dtype != "float32",
        device=known.device_memory,
        keep_abilities=known.keep_abilities,
    )


def show(situation: Situation, console: Console) -> None:
    """Prints advice."""
    table = Table.grid(padding=(0, 2))
    for own in advised(situation):
        table.add_row(own.topic, f"{own.text} (docs/{own.source})")
    console.print(table)


def main(
    program: str,
    presets: command_line.Presets[ImageConfig],
    argv: Sequence[str] | None,
    suite: str,
) -> list[str] | None:
    """Prints advice where words ask for it; else returns the words, which do not.

    Args:
      program: name of the command.
      presets: presets that `--config` may name.
      argv: words after the program's name; None for those of the process.
      suite: name of the suite of all tasks.

    Raises:
      SystemExit: an option is wrong, or an input is missing.
    """
    known, words = asked(program, sys.argv[1:] if argv is None else argv)
    if known is None:
        return words
    _, config = command_line.parse(program, presets, words, suite)
    with terminal.exit_on_error(program):
        if known.device_memory is not None and not known.device_memory > 0:
            raise ValueError(
                f"device_memory={known.device_memory}: expected a positive number."
            )
        show(of_run(config, known), terminal.console())
    return None
