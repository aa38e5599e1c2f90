"""Draws every prompt that the toy was trained on, and lets the probe name the pictures.

    python -m experiments.pretrained.toy_check

Prints and writes the share of pictures whose subcategory the probe names: of the real
pictures, which it was fitted to; of real ones it was not fitted to (cross-validation);
and of the drawn ones, with one picture for each emoji's name. The toy is good enough if
the last is at least half of the first.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import tyro
from jaxtyping import UInt8
from rich.progress import track

from experiments import files, terminal
from experiments.paths import Given
from experiments.pretrained import emoji_probe, toy_sd3
from experiments.pretrained.toy_sd3 import GUIDANCE, SIZE
from experiments.tasks import emoji
from experiments.tasks.emoji_captions import WHITE
from snella_jax.models.sd3 import Pipeline

PROGRAM = "python -m experiments.pretrained.toy_check"
BATCH = 50


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """Options of `python -m experiments.pretrained.toy_check`."""

    emoji: Given = emoji.FOLDER
    """Folder of the unpacked package emoji-datasource-twitter."""
    weights: Given = toy_sd3.WEIGHTS
    """Weights of the toy."""
    out: Given = Path("toy_check.json")
    """File for the shares."""
    guidance: float = GUIDANCE
    """Strength of the prompts."""
    take: int = 1
    """1 for all prompts, 10 for every tenth."""
    seed: int = 0
    """Seed of the noise."""


def main(argv: list[str] | None = None) -> None:
    """Draws, and prints and writes the shares."""
    config = tyro.cli(CheckConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        found = [one for one in emoji.read(config.emoji) if not one.unseen]
        pipeline = toy_sd3.load(path=config.weights)
        vit = emoji_probe.vit()
        probe, accuracy = emoji_probe.load()
    found = found[:: config.take]
    truth = [one.subcategory for one in found]
    real = emoji.on(emoji.pictures(found), WHITE)
    drawn = drawings(pipeline, [one.name for one in found], config)
    shares = {
        name: emoji_probe.share(probe.named(emoji_probe.features(vit, own)), truth)
        for name, own in (("real", real), ("drawn", drawn))
    }
    made = {
        "pictures": len(found),
        **shares,
        "cross_validated": accuracy["cross_validated"],
        "guidance": config.guidance,
        "accepted": shares["drawn"] >= shares["real"] / 2,
    }
    print(json.dumps(made))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    files.write(config.out, made)


def drawings(
    pipeline: Pipeline, prompts: list[str], config: CheckConfig
) -> UInt8[np.ndarray, "N 32 32 3"]:
    """Draws a picture of each prompt."""
    filled = prompts + prompts[-1:] * (-len(prompts) % BATCH)  # one shape for all
    found = []
    for first in track(range(0, len(filled), BATCH), "drawing"):
        key = jax.random.fold_in(jax.random.key(config.seed), first)
        some = filled[first : first + BATCH]
        drawn = pipeline(some, size=SIZE, guidance=config.guidance, key=key)
        found.append(np.asarray(drawn))
    return np.concatenate(found)[: len(prompts)]


if __name__ == "__main__":
    main()
