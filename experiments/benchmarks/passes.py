r"""Counts a layer's passes over its weight in the program compiled for a device.

    python -m experiments.benchmarks.passes --target h100

compiles `y`, `dx` and the factors' gradients of one adapted layer for the target, which
need not be present. A *pass* is a read or a write of `n m` numbers of 32 bits (float32,
and the bit patterns that the threshold is searched for in) by an instruction that runs:
a fusion, a matmul, a copy. What is inside a fusion stays in registers and is no pass;
neither are tuples, bitcasts and barriers. An operand counts once for each instruction
that reads it, as a whole also where it is sliced. bfloat16 (the frozen and the merged
weight, the gradient of the weight) counts as half a pass, a mask as a quarter. Inside a
loop, where the search for the threshold is, instructions count as often as it turns.

Prints a table and writes `passes.json` into `--out`.

    python -m experiments.benchmarks.passes --target h100 --chips 4

does so for a chip of a mesh that the weight's columns are split over, and counts the
collectives.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.table import Table

from experiments import terminal
from experiments.benchmarks import collectives, targets
from experiments.benchmarks.hlo import ArrayType, computations
from experiments.paths import Given, check_out
from experiments.reports import result_files
from snella_jax import adapted_dense, kernels

PROGRAM = "python -m experiments.benchmarks.passes"
WIDE = 4  # bytes of the numbers of a whole pass
# Instructions that move nothing.
FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "tuple",
}


@dataclasses.dataclass(frozen=True)
class PassesConfig:
    """Options of `python -m experiments.benchmarks.passes`."""

    target: targets.Target = "h100"
    """Device that the layer is compiled for."""
    chips: int = 1
    """Chips that the weight's columns are split over."""
    n: int = 768
    """Inputs of the layer."""
    m: int = 3072
    """Outputs of the layer."""
    tokens: int = 6304
    """Rows of the layer's input."""
    rank: int = 8
    """Rank of the factors."""
    kernel: str = "mix_k"
    """Kernel of the update."""
    centred: Literal["none", "rows", "columns", "both"] = "none"
    """Means that the kernel takes out."""
    start: Literal["kernel", "zero"] = "kernel"
    """Where the update starts (not of linear)."""
    gate: str = "product"
    """Gate of the update."""
    out: Given = Path("runs/passes")
    """Folder to write passes.json into."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Compiles, and returns the content of `passes.json`."""
    config = tyro.cli(PassesConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        chips = targets.devices(config.target, config.chips)
        text = compiled(config, chips)
        size = config.n * config.m // config.chips
    result = {
        **dataclasses.asdict(config),
        **of(text, size),
        "collectives": collectives.of(text),
        "device": targets.describe(config.target),
        "jax": jax.__version__,
        "out": str(config.out),
    }
    result_files.write(
        config.out, "passes", result, terminal.console(), table=_table(result)
    )
    return result


def compiled(config: PassesConfig, chips: list[Any]) -> str:
    """Returns the HLO text of a layer, forward and backward, for one of its chips.

    Raises:
      ValueError: the columns do not split evenly, or an activation could be taken for
        an array of the weight's size.
    """
    n, m, tokens = config.n, config.m, config.tokens
    if m % config.chips:
        raise ValueError(f"m={m}: expected a multiple of chips={config.chips}.")
    for size in (tokens * n, tokens * m // config.chips):
        if size % (n * m // config.chips) == 0:
            raise ValueError(
                f"tokens={tokens}: expected a number for which no activation has as "
                "many numbers as a whole number of weights."
            )
    usual: Any = kernels.named(config.kernel)
    own = {"centred": config.centred}
    own |= {} if config.start == "kernel" else {"start": config.start}
    kernel: Any = dataclasses.replace(usual, **own)

    def layer(x, w0, factors, budget, cotangent):
        def adapted(x, factors):
            how: Any = {"kernel": kernel, "gate": config.gate}
            return adapted_dense(x, w0, factors, budget, **how)

        y, back = jax.vjp(adapted, x, factors)
        return y, back(cotangent)

    mesh = Mesh(np.array(chips), ("columns",), axis_types=(AxisType.Auto,))

    def placed(shape, dtype, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    factors = jax.eval_shape(
        lambda key: kernel.init(key, (n, m), config.rank), jax.random.key(0)
    )
    arguments = (
        placed((tokens, n), jnp.bfloat16),
        placed((n, m), jnp.bfloat16, None, "columns"),
        {name: placed(value.shape, value.dtype) for name, value in factors.items()},
        placed((), jnp.int32),
        placed((tokens, m), jnp.bfloat16, None, "columns"),
    )
    return jax.jit(layer).lower(*arguments).compile().as_text() or ""


def of(hlo: str, size: int) -> dict[str, Any]:
    """Returns the passes of the search and all others, in all and by dtype.

    Args:
      hlo: text of a compiled program.
      size: numbers of the weight, `n m`, on one chip.

    Raises:
      ValueError: a loop reads the weight and the text does not tell how often it turns.
    """
    found = {name: {"passes": 0.0, "by_dtype": {}} for name in ("search", "others")}
    for move in _moves(hlo, size):
        own = found["search" if move.in_loop else "others"]
        own["passes"] += move.passes * move.array.itemsize / WIDE
        of_dtype = own["by_dtype"].setdefault(
            move.array.dtype, {"reads": 0.0, "writes": 0.0}
        )
        of_dtype[move.kind] += move.passes
    return found


@dataclasses.dataclass(frozen=True)
class _Move:
    """One of the "reads" or "writes", of `passes` times the weight's size."""

    kind: str
    array: ArrayType
    passes: float
    in_loop: bool


def _moves(hlo: str, size: int) -> Iterator[_Move]:
    lines_of, entry = computations(hlo)

    def inside(name: str, turns: int, in_loop: bool) -> Iterator[_Move]:
        arrays: dict[str, ArrayType] = {}
        for line in lines_of.get(name, ()):
            if not line.type.startswith("(") and line.arrays:
                (arrays[line.name],) = line.arrays
            if line.loop:
                condition, body = line.loop
                known = line.turns(lines_of.get(condition, ()))
                moves = list(inside(body, turns * (known or 1), True))
                if moves and known is None:
                    raise ValueError(
                        f"{line.name}: it does not say how often it turns."
                    )
                yield from moves
            elif line.op in ("call", "conditional"):
                for callee in line.called:
                    yield from inside(callee, turns, in_loop)
            elif line.op not in FREE and not line.op.endswith(("-done", "-update")):
                read = [
                    arrays[name]
                    for name in dict.fromkeys(line.operands)
                    if name in arrays
                ]
                for kind, moved in (("reads", read), ("writes", line.arrays)):
                    for array in moved:
                        numbers = math.prod(array.shape)
                        if numbers and numbers % size == 0:
                            yield _Move(kind, array, turns * numbers // size, in_loop)

    return inside(entry, 1, False)


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"Passes over {result['n']} x {result['m']}, {result['kernel']}, "
        f"{result['gate']}: {result['device']}"
    )
    for name in ("", "dtype", "reads", "writes", "passes"):
        table.add_column(name, justify="left" if name in ("", "dtype") else "right")
    for part in ("search", "others"):
        for dtype, own in result[part]["by_dtype"].items():
            table.add_row(part, dtype, f"{own['reads']:g}", f"{own['writes']:g}", "")
        table.add_row(part, "all", "", "", f"{result[part]['passes']:g}")
    return table


if __name__ == "__main__":
    main()
