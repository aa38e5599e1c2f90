"""What to start with for a task, a model and a device, each with where it comes from.

    python -m experiments.vtab --suggest --task FOLDER --model FILE --device_memory 16

prints method, rates, rank, density and memory, and trains nothing. `--keep_abilities`
says that what the model can do already matters. Memory is that of a ViT-B/16 compiled
at 224 px, scaled by the numbers of weights and of the blocks' outputs.
"""

import argparse
import dataclasses
import math
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
from experiments.pretrained import base_models, small_vit
from experiments.runs import images
from snella_jax.models.vit import ViTConfig

FLAG = "--suggest"
MEASURED = Path(__file__).parents[1] / "results" / "memory"
# Of the ViT-B/16 that was compiled: outputs of its blocks, batch 64 at 224 px.
OUTPUTS = 64 * 197 * 768 * 12
GIB = 2**30
FITS = 0.8  # of a device: the estimate is rough, and the runtime takes some
FULL = MEASURED / "h100_vit_b16_batch64_sketch4" / "memory.json"
CHOICES = MEASURED / "h100_vit_b16_batch64_choices" / "choices.json"
COMPILED = {  # by what gives it: its rows' choice and sketch
    "": ("as it comes", 1),
    "--memory lean": ("lean", 1),
    "--memory lean --activation gelu2 --snella.sketch 4": ("lean, gelu2", 4),
}


@dataclasses.dataclass(frozen=True)
class Situation:
    """What advice depends on.

    Attributes:
      tested: images to test on.
      classes: number of classes.
      weights: numbers of the model.
      width: width of its tokens; None of models without one.
      outputs: numbers of the blocks' outputs for what is computed at once; None as
        `width`.
      half: True to compute in 16 bits.
      device: GiB of the device; None if that was not said.
      keep_abilities: what the model can do already matters.
      small: it is the quickstart's model.
      source: whose settings the preset has, if they are published.
    """

    tested: int
    classes: int
    weights: int
    width: int | None
    outputs: int | None
    half: bool = False
    device: float | None = None
    keep_abilities: bool = False
    small: bool = False
    source: str | None = None


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
    if situation.source is not None:
        text = (
            f"this preset's, of {situation.source}: rates, rank and density included."
        )
        found.insert(0, Advice("settings", text, "training.md#recipes"))
    found += [
        Advice("rank", "8: ranks of 4 to 32 differed less than seeds.", "ablations.md"),
        Advice(
            "density",
            "0.3, the best of 0.1, 0.3 and 0.6 on validation of three tasks; search it "
            "by --search.",
            "choosing.md#rate-rank-and-density",
        ),
        Advice(
            "test",
            f"{situation.tested} images, {situation.classes} classes: compare "
            "methods by several --seed, and rates by --search.",
            "choosing.md#what-a-difference-is-worth",
        ),
    ]
    return [*found, _memory(situation)]


def _method(situation: Situation) -> Advice:
    if situation.keep_abilities:
        text = (
            "none is shown to keep more. A language model's perplexity of other prose "
            "rose least with snell (all weights) and dora, two seeds each; measure it "
            "on what your model has to keep (experiments.studies.sparsity)."
        )
        return Advice("method", text, "choosing.md#what-the-model-could-do-before")
    text = (
        "bias and lora first; snella where both leave something to gain, or only a "
        "share of the weights may move. With rates searched alike it has not been "
        "ahead of lora on images here."
    )
    return Advice("method", text, "choosing.md#method")


def _rates(situation: Situation) -> Advice:
    if situation.small:
        usual = "2e-2 for snella, 1e-2 for lora"
    elif situation.width == 384:
        usual = "3e-3 to 9e-3 for snella and bias, 1e-3 for lora, 3e-5 to 9e-5 for full"
    else:
        usual = (
            "3e-3 for snella, 1e-3 for lora and bias, 3e-5 for full: a guess, as only "
            "a ViT-S was searched"
        )
    text = (
        f"{usual}. Search each by itself: at 3 times its best, snella was at chance on "
        "two of three tasks."
    )
    return Advice("rates", text, "choosing.md#rate-rank-and-density")


def gib(situation: Situation, method: str, options: str = "") -> float:
    """Returns about how many GiB a training step takes, with AdamW.

    Weights count 4 bytes, full fine-tuning's 12 with AdamW's sums and 6 for gradients
    and what it computes with; the rest grows with the blocks' outputs.

    Args:
      method: `lora`, `snella`, or `full` without options.
      options: a key of `COMPILED`.

    Raises:
      ValueError: the model has no tokens of one width.
    """
    if situation.outputs is None:
        raise ValueError("only memory of models with tokens of one width is scaled.")
    wanted = (method, *COMPILED[options])
    rows = [{"choice": "as it comes"} | row for row in files.read(FULL)]
    rows = [row for row in rows if row["method"] == "full"] + files.read(CHOICES)
    (row,) = (r for r in rows if (r["method"], r["choice"], r["sketch"]) == wanted)
    weights = row["argument_bytes"] / row["parameters"]
    # Frozen weights were compiled in 16 bits; full's gradients are among temporaries.
    extra, fixed = (0, 6) if method == "full" else (2, 0)
    kept = (row["temporary_bytes"] - fixed * row["parameters"]) / OUTPUTS
    kept *= 1 if situation.half else 2
    total = (weights + extra + fixed) * situation.weights + kept * situation.outputs
    return total / GIB


def _memory(situation: Situation) -> Advice:
    source = "performance.md#below-lora"
    if situation.outputs is None:
        text = "measure it: python -m experiments.benchmarks.memory --model NAME"
        return Advice("memory", text, "performance.md#memory")
    usual = {m: gib(situation, m) for m in ("full", "lora", "snella")}
    text = "about " + ", ".join(f"{size:.2g} GiB for {m}" for m, size in usual.items())
    text += " as the model comes"
    if situation.device is None:
        return Advice("memory", f"{text}; --device_memory says what fits.", source)
    for options in COMPILED:
        size = gib(situation, "snella", options)
        if size > FITS * situation.device:
            continue
        how = f"with {options} ({size:.2g} GiB)" if options else "so"
        price = " (half a point on digits, -1 to 2; more noise in budgets)" * (
            "sketch" in options
        )
        return Advice("memory", f"{text}; snella fits {how}{price}.", source)
    text += (
        f"; no option fits {situation.device:g} GiB: a smaller --batch, --accumulate"
    )
    half = "" if situation.half else " or --dtype bfloat16"
    return Advice("memory", f"{text}{half}.", source)


def asked(
    program: str, argv: Sequence[str]
) -> tuple[argparse.Namespace | None, list[str]]:
    """Returns what words ask for advice, None without `--suggest`, and the others."""
    first = command_line.parser(program)
    first.add_argument(FLAG, action="store_true")
    first.add_argument("--device_memory", "--device-memory", type=float)
    first.add_argument("--keep_abilities", "--keep-abilities", action="store_true")
    known, rest = first.parse_known_args(list(argv))
    if known.suggest:
        return known, rest
    if known.device_memory is not None or known.keep_abilities:
        raise SystemExit(
            f"{program}: --device_memory and --keep_abilities need {FLAG}: add it."
        )
    return None, rest


def of_run(config: ImageConfig, known: argparse.Namespace) -> Situation:
    """Returns the situation of a run, whose task and model are loaded.

    Raises:
      ValueError, OSError, ModuleNotFoundError: as in `images.prepared`.
    """
    task = images.loaded(config)
    images.check_classes(task)
    base: Any = base_models.load(config, task.classes)
    shape = base.config
    width = outputs = None
    if isinstance(shape, ViTConfig):
        width = shape.width
        tokens = math.prod(shape.grid) + shape.class_token
        at_once = config.batch // config.accumulate
        outputs = at_once * tokens * width * shape.depth
    published = config.source != ImageConfig.source
    return Situation(
        tested=min(len(task.test), config.test_images or len(task.test)),
        classes=task.classes,
        weights=sum(np.size(x) for x in jax.tree.leaves(nnx.state(base, nnx.Param))),
        width=width,
        outputs=outputs,
        half=config.dtype != "float32",
        device=known.device_memory,
        keep_abilities=known.keep_abilities,
        small=config.model == small_vit.NAME,
        source=config.source if published else None,
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
    if "--resume" in words or {suite, f"--config={suite}"} & {*words}:
        raise SystemExit(
            f"{program}: {FLAG} is for one task: expected --config NAME of one preset, "
            f"not {suite} nor --resume."
        )
    _, config = command_line.parse(program, presets, words, suite)
    with terminal.exit_on_error(program):
        if known.device_memory is not None and not known.device_memory > 0:
            raise ValueError(
                f"device_memory={known.device_memory}: expected a positive number."
            )
        show(of_run(config, known), terminal.console())
    return None
