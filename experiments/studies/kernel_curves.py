"""Draws the kernels in one dimension (the paper's Figure 4(a)).

    python -m experiments.studies.kernel_curves

There is one input of 0, and outputs x from -`reach` to `reach`, with factors of one
column and one piece. The coefficient of distances is -1, so that every kernel is
largest where the two coincide; a kernel that is normalised over the outputs is
multiplied by their number. Writes `kernel_curves.json` and `kernel_curves.png` into
`--out`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

import snella_jax as snella
from experiments import terminal
from experiments.paths import Given, check_out
from experiments.reports import result_files
from experiments.studies import kernel_figures

PROGRAM = "python -m experiments.studies.kernel_curves"
POINTS = 101
NORMALIZED = ("normalized_rbf", "mix_k")


@dataclasses.dataclass(frozen=True)
class CurvesConfig:
    """Options of `python -m experiments.studies.kernel_curves`."""

    reach: float = 5.0
    """Largest x."""
    out: Given = Path("runs/kernel_curves")
    """Folder to write kernel_curves.json and kernel_curves.png into."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Writes both files, and returns the content of `kernel_curves.json`."""
    config = tyro.cli(CurvesConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        if not 0 < config.reach < np.inf:
            raise ValueError(f"reach={config.reach}: expected more than 0.")
    x = np.linspace(-config.reach, config.reach, POINTS)
    curves = {"x": x.tolist(), "rows": [row(n, x) for n in snella.kernels.KERNELS]}
    draw, console = kernel_figures.curves, terminal.console()
    result_files.write(config.out, "kernel_curves", curves, console, draw)
    return curves


def row(name: str, x: np.ndarray) -> dict[str, Any]:
    """Returns a kernel's values at 0 and x, and their slopes.

    The linear kernel and the sigmoid, which see a product, are evaluated at 1 and x.

    >>> row("rbf", np.array([-1.0, 0.0, 1.0]))["values"][1]
    1.0
    """
    kernel: Any = snella.kernels.KERNELS[name]
    fields = {field.name for field in dataclasses.fields(kernel)}
    kernel = kernel(**({"pieces": 1} if "pieces" in fields else {}))
    at = 1.0 if name in ("linear", "sigmoid") else 0.0
    scale = len(x) if name in NORMALIZED else 1
    factors = {
        "a": jnp.full((1, 1, 1), at),
        "b": jnp.asarray(x, jnp.float32).reshape(1, -1, 1),
        "piece_coeff": jnp.full(1, -1.0),
        "alpha": jnp.float32(scale),
        "beta": jnp.float32(0),
    }
    values = np.asarray(kernel.apply(factors), np.float64)[0]
    return {
        "kernel": name,
        "values": values.tolist(),
        "slopes": np.gradient(values, x).tolist(),
    }


if __name__ == "__main__":
    main()
