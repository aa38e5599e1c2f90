"""The kernels in one dimension (the paper's Figure 4(a)).

    python -m experiments.studies.kernel_curves

One input of 0 and outputs x from -`reach` to `reach`, with factors of one column and
one piece. The coefficient of distances is -1, so that all kernels are largest where the
two coincide; what is normalised over the outputs is multiplied by their number. Writes
`kernel_curves.json` and `.png`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

import snella_jax as snella
from experiments import files, showing
from experiments.paths import Given
from experiments.studies import kernel_figures

POINTS = 101
NORMALIZED = ("normalized_rbf", "mix_k")


@dataclasses.dataclass(frozen=True)
class CurvesConfig:
    """Options of `python -m experiments.studies.kernel_curves`."""

    reach: float = 5.0
    """The largest x."""
    out: Given = Path("runs/kernel_curves")
    """Folder for kernel_curves.json and .png."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parses the command line, draws, and returns what the JSON file holds."""
    program = "python -m experiments.studies.kernel_curves"
    config = tyro.cli(CurvesConfig, prog=program, args=argv, description=__doc__)
    if not 0 < config.reach < np.inf:
        raise SystemExit(f"{program}: reach={config.reach}: expected more than 0.")
    x = np.linspace(-config.reach, config.reach, POINTS)
    rows = [row(name, x) for name in snella.kernels.KERNELS]
    result = {"x": x.tolist(), "rows": rows}
    config.out.mkdir(parents=True, exist_ok=True)
    files.write(config.out / "kernel_curves.json", result)
    kernel_figures.curves(config.out / "kernel_curves.png", x, rows)
    text = f"kernel_curves.json and .png are in {config.out}"
    showing.console().print(text, soft_wrap=True)
    return result


def row(name: str, x: np.ndarray) -> dict[str, Any]:
    """A kernel's values at 0 and x, and their slopes.

    Of the linear kernel and the sigmoid, which see a product, at 1 and x.

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
