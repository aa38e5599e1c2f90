r"""Measures memory against recomputed matmuls, for everything that blocks may keep.

    python -m experiments.benchmarks.choices --target h100 --model vit_b16 --batch 64 \
        --sketch 1 4

compiles a step for each choice of `--memory`, `--activation` and `--remat`, with LoRA
beside SNELLA, for a device that need not be present. Prints a table, and writes
`choices.json` and `choices.png` into `--out`. TFLOP counts the matmuls of a step, those
that are computed again included. A choice that saves nothing for a model is shown, too.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from adjustText import adjust_text
from matplotlib import patheffects
from rich.progress import track
from rich.table import Table

from experiments import plotting, terminal
from experiments.benchmarks import figures, memory, targets
from experiments.paths import Given, check_out
from experiments.plotting import plt
from experiments.reports import result_files
from experiments.reports.text import memory_setup
from snella_jax.models import llama

PROGRAM = "python -m experiments.benchmarks.choices"
AS_IT_COMES = "as it comes"
CHOICES: dict[str, dict[str, Any]] = {
    AS_IT_COMES: {},
    "gelu2": {"activation": "gelu2"},
    "lean": {"memory": "lean"},
    "lean, gelu2": {"memory": "lean", "activation": "gelu2"},
    "lean+attention": {"memory": "lean+attention"},
    "lean+qkv": {"memory": "lean+qkv"},
    "lean+hidden": {"memory": "lean+hidden"},
    "blocks": {"remat": "blocks"},
}


@dataclasses.dataclass(frozen=True)
class ChoicesConfig:
    """Options of `python -m experiments.benchmarks.choices`."""

    target: targets.Target = "local"
    """Device that the step is compiled for."""
    model: str = "vit_b16"
    """Preset of snella_jax.models."""
    batch: int = 64
    """Images or texts in a step."""
    sequence: int = 256
    """Tokens of a text."""
    method: tuple[str, ...] = ("lora", "snella")
    """Methods to compare."""
    sketch: tuple[int, ...] = (1,)
    """Tokens to one that is kept of a layer's input; 1: all."""
    out: Given = Path("runs/choices")
    """Folder to write choices.json and choices.png into."""

    def each(self) -> list[tuple[str, memory.MemoryConfig]]:
        """Returns the options of every choice with its name."""
        found = []
        for name, changes in CHOICES.items():
            own: dict[str, Any] = {"remat": "none"} | changes
            if self.model in llama.PRESETS and "activation" in own:
                own["activation"], name = "silu2", name.replace("gelu2", "silu2")
            whole = memory.MemoryConfig(
                method=self.method,
                batch=self.batch,
                sequence=self.sequence,
                sketch=self.sketch,
                target=self.target,
                model=(self.model,),
                **own,
            )
            found.append((name, whole))
        return found


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Compiles, and returns the rows of `choices.json`."""
    config = tyro.cli(ChoicesConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        left = [
            (name, setting)
            for name, own in config.each()
            for setting in own.settings(config.model)
        ]
        where = config.each()[0][1].where()
    console = terminal.console()
    rows = [
        {"choice": name} | memory.row(setting, config.target, where)
        for name, setting in track(left, "compiling", console=console)
    ]
    result_files.write(config.out, "choices", rows, console, draw, table(rows))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns GiB and TFLOP of every choice, a column for each method."""
    first = rows[0]
    found = Table(title=f"{first['model']}: {memory_setup(first)}")
    labels = [*dict.fromkeys(figures.label(row) for row in rows)]
    found.add_column("choice", no_wrap=True)
    for label in labels:
        found.add_column(f"{label}, GiB", justify="right")
        found.add_column("TFLOP", justify="right")
    for name in dict.fromkeys(row["choice"] for row in rows):
        own = {figures.label(row): row for row in rows if row["choice"] == name}
        cells = [
            (f"{r['total_bytes'] / 2**30:.2f}", f"{r['matmul_flops'] / 1e12:.2f}")
            for r in map(own.__getitem__, labels)
        ]
        found.add_row(name, *(cell for pair in cells for cell in pair))
    return found


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws memory against operations: a point a choice, a colour a method.

    Args:
      path: the PNG to write.
      rows: rows of `choices.json`.
    """
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    texts = []
    halo = [patheffects.withStroke(linewidth=2, foreground="white")]
    for index, label in enumerate(dict.fromkeys(map(figures.label, rows))):
        own = [row for row in rows if figures.label(row) == label]
        x = [row["matmul_flops"] / 1e12 for row in own]
        y = [row["total_bytes"] / 2**30 for row in own]
        axes.plot(x, y, "o", color=f"C{index}", label=label)
        style: dict[str, Any] = {
            "fontsize": 7,
            "color": f"C{index}",
            "path_effects": halo,
        }
        names = (row["choice"] for row in own)
        texts += [
            axes.text(where, height, name, **style)
            for where, height, name in zip(x, y, names, strict=True)
        ]
    axes.set(
        xlabel="operations of a step's matmuls (TFLOP)",
        ylabel="memory of a step (GiB)",
        ylim=(0, None),
        title=f"{rows[0]['model']}: {memory_setup(rows[0])}",
    )
    axes.margins(x=0.1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    arrows = {"arrowstyle": "-", "color": "grey", "lw": 0.5}
    adjust_text(texts, ax=axes, expand=(1.2, 1.6), arrowprops=arrows, iter_lim=900)
    plotting.save(figure, path)


if __name__ == "__main__":
    main()
