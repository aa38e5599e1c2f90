"""The config of an adapted model: `SnellaConfig`, and the `Rule` it gives each weight.

>>> config = SnellaConfig(rank=8, overrides={r".*/fc2": {"rank": 16}})
>>> config.rule("blocks/mlp/fc1").rank, config.rule("blocks/mlp/fc2").rank
(8, 16)
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from snella_jax import kernels
from snella_jax.core.budgets import budget_schedule
from snella_jax.core.fused import Implementation, check_implementation
from snella_jax.core.gates import check_gate
from snella_jax.core.paths import listed
from snella_jax.core.update import Path, check_path
from snella_jax.ops.sketch import Kind, Sketch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Rank, kernel, gate and path of one weight's update.

    Attributes:
      rank: `r`, columns of the factors; a multiple of the kernel's pieces.
      kernel: a kernel of `snella_jax.kernels`, or its name for default settings.
      gate: value of a surviving weight, see `sparsify`.
      path: "merged" or "parallel", see `adapted_dense`.
      dropout: rate on the update's input, in training; needs `path="parallel"`.
      drop_path: rate at which an example loses the update, in training; needs
        `path="parallel"`.
      split: number of matrices side by side in the weight's first output axis, each
        with factors and a budget of its own: 3 for a fused qkv.
      sketch: rows of the input to one that is kept for the weight's gradient, in
        training, see `ops.sketch`; 1 for all. Needs `path="merged"` and a layer that
        multiplies the last axis of its input.
      sketch_kind: "sample", "strided" or "crs".
      keep_rows: positions on the input's token axis, the last but one, that are always
        kept: `(0,)` for a class token.
      implementation: "auto", "xla" or "pallas", see `adapted_dense`; a property of the
        machine, not of the adapter.

    Raises:
      ValueError: a value that the attribute does not allow.
    """

    rank: int = 8
    kernel: str | kernels.Kernel = "mix_k"
    gate: str = "product"
    path: Path = "merged"
    dropout: float = 0.0
    drop_path: float = 0.0
    split: int = 1
    sketch: int = 1
    sketch_kind: Kind = "sample"
    keep_rows: tuple[int, ...] = ()
    implementation: Implementation = "auto"

    def __post_init__(self):
        object.__setattr__(self, "keep_rows", self.rows.keep_rows)
        kernel = kernels.named(self.kernel)
        object.__setattr__(self, "kernel", kernel)
        check_gate(self.gate)
        check_implementation(self.implementation)
        check_path(self.path, self.dropout, self.drop_path, self.rows)
        pieces = getattr(kernel, "pieces", 1)
        if not isinstance(self.rank, Integral) or self.rank < 1 or self.rank % pieces:
            raise ValueError(
                f"rank={self.rank} is not a positive multiple of pieces={pieces}."
            )
        if kernels.starts_at_zero(kernel) and self.gate in ("product", "released"):
            raise ValueError(
                f"kernel={kernel} starts at 0, where gate={self.gate!r} passes no "
                f"gradient: expected {_elsewhere(kernel)}, or gate='hard'."
            )
        if not isinstance(self.split, Integral) or self.split < 1:
            raise ValueError(
                f"split={self.split}: expected a whole number of at least 1."
            )

    @property
    def rows(self) -> Sketch:
        """Rows of the input that are kept for the weight's gradient."""
        return Sketch(self.sketch, self.sketch_kind, self.keep_rows)

    @property
    def needs_key(self) -> bool:
        """True if training draws at random what it drops, or the rows."""
        return bool(self.dropout or self.drop_path or self.sketch > 1)

    @property
    def low_rank(self) -> bool:
        """True if the update is the product of its two factors, as LoRA's is."""
        kernel = self.kernel
        product = isinstance(kernel, kernels.linear) and kernel.centred == "none"
        return product and self.gate == "none"


class Names(NamedTuple):
    """Regexes of what is adapted, and of what trains besides."""

    targets: str
    trainable: str


USUAL = Names(r"blocks/.*/(query|key|value|out|fc1|fc2)", r"head|cls_token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnellaConfig(Rule):
    """Config of an adapted model: a `Rule` for all targets, and what is common to them.

    Regexes are matched in full against "/"-joined paths of the model, such as
    `blocks/attn/query`.

    Attributes:
      initial_density: `b_0` as a fraction of all adapted weights.
      target_density: `b_T` as a fraction of all adapted weights. (The released code
        counts sparsity, `1 - density`.)
      allocation: "adaptive", the matrices compete and `reallocate` moves their budgets;
        or "fixed", every matrix keeps `target_density` from the start (SNELL).
      targets: regex of the weights to adapt. The default stands for the
        `default_targets` of a model that has these, such as a LLaMA.
      trainable: regex of what trains besides: variables, or modules with all they hold;
        "" for nothing. The default stands for the `default_trainable` of a model.
      frozen_dtype: dtype in which the weights that do not train are kept, such as
        `jnp.bfloat16` (half the memory); None leaves them as they are.
      overrides: for a regex of targets, the fields of `Rule` that differ; the first
        that matches a path holds.

    Raises:
      ValueError: a value that the attribute does not allow, a regex that does not
        compile, or an override of a field that `Rule` does not have.
      TypeError: a regex that is no string.
    """

    initial_density: float = 1.0
    target_density: float = 0.3
    allocation: Literal["adaptive", "fixed"] = "adaptive"
    targets: str = USUAL.targets
    trainable: str = USUAL.trainable
    frozen_dtype: Any = None
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=dict, hash=False
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("initial_density", "target_density"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 to 1.")
        if self.allocation not in ("adaptive", "fixed"):
            raise ValueError(
                f"allocation={self.allocation!r}: expected adaptive or fixed."
            )
        if self.initial_density == 0 and self.allocation == "adaptive":
            raise ValueError(
                "initial_density=0 lets no weight move, so no gradient says which "
                "should: expected more than 0."
            )
        dtype = self.frozen_dtype
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"frozen_dtype={dtype}: expected a floating-point dtype.")
        for regex in (self.targets, self.trainable, *self.overrides):
            if not isinstance(regex, str):
                raise TypeError(
                    f"The regex {regex!r} is no string: expected one for all paths, "
                    'such as "conv.*|dense".'
                )
            try:
                re.compile(regex)
            except re.error as error:
                raise ValueError(
                    f"The regex {regex!r} does not compile: {error}."
                ) from error
        fields = [field.name for field in dataclasses.fields(Rule)]
        for regex, changes in self.overrides.items():
            unknown = sorted(changes.keys() - set(fields))
            if unknown:
                raise ValueError(
                    f"overrides[{regex!r}] has {', '.join(unknown)}: expected some of "
                    f"{', '.join(fields)}."
                )
        rules = [self, *map(self._rule, self.overrides.values())]
        own = [kernels.named(rule.kernel) for rule in rules]
        zero = [kernel for kernel in own if kernels.starts_at_zero(kernel)]
        if zero and self.starting_density < 1:
            raise ValueError(
                f"kernel={zero[0]} starts at 0, where a density of "
                f"{self.starting_density} lets no weight move: expected a density of 1 "
                f"at the start, or {_elsewhere(zero[0])}."
            )
        gates = {self.gate, *(c.get("gate") for c in self.overrides.values())}
        if "none" in gates and min(self.starting_density, self.target_density) < 1:
            raise ValueError(
                "gate='none' lets every weight move: expected target_density=1 and, "
                "where budgets move, initial_density=1."
            )

    @classmethod
    def released(cls, **changes: Any) -> "SnellaConfig":
        """Returns the settings of the authors' released code instead of the paper's.

        Mix-K with a learnt temperature and fixed piece coefficients, rank 32, the
        `released` gate on the parallel path, dropout and drop-path of 0.1. Before
        the attention's output projection it has no dropout: that is an override for the
        default targets, which other targets need to set themselves. A model without
        attention takes `overrides={}`.
        """
        settings = {
            "rank": 32,
            "kernel": kernels.mix_k(temperature=True, learn_piece_coeff=False),
            "gate": "released",
            "path": "parallel",
            "dropout": 0.1,
            "drop_path": 0.1,
        }
        if "targets" not in changes:
            settings["overrides"] = {r".*/out": {"dropout": 0.0}}
        return cls(**(settings | changes))

    @classmethod
    def plus(cls, **changes: Any) -> "SnellaConfig":
        """Returns settings of our own instead of the paper's; provisional.

        Mix-K without the means of rows and columns and started at 0, and the `hard`
        gate. Learning rates are then of LoRA's kind, 3e-4 to 1e-3 with Adam (it
        diverged at 3e-3).
        `docs/kernels.md` has the equations, and the evidence so far, which is two seeds
        on one task of a kernel that started at 0 in another way.
        """
        settings = {
            "kernel": kernels.mix_k(
                # Most of a distance is the same along a row or a column. Its row: study
                # "centred" of the ablations, to come.
                centred="both",
                # An update that is not 0 is noise on all weights at first. Its row: the
                # same study, to come.
                start="zero",
            ),
            # From 0 the paper's gate, delta * |delta|, passes no gradient. Its row: the
            # same study, to come.
            "gate": "hard",
        }
        return cls(**(settings | changes))

    @property
    def must_move(self) -> bool:
        """True if training has to reallocate budgets to do what the config says."""
        sparse = min(self.initial_density, self.target_density) < 1
        return self.allocation == "adaptive" and sparse

    @property
    def starting_density(self) -> float:
        """Density before the first reallocation."""
        fixed = self.allocation == "fixed"
        return self.target_density if fixed else self.initial_density

    def names(self, model: Any) -> Names:
        """Returns `targets` and `trainable`; where they are the defaults, the model's.

        >>> class Llama:
        ...     default_targets, default_trainable = r".*/(q|k|v|up|down)", ""
        >>> SnellaConfig().names(Llama()), SnellaConfig(targets="fc").names(Llama())[0]
        (Names(targets='.*/(q|k|v|up|down)', trainable=''), 'fc')
        """
        own = Names(self.targets, self.trainable)
        return Names(
            *(
                getattr(model, f"default_{name}", value) if value == usual else value
                for name, value, usual in zip(Names._fields, own, USUAL, strict=True)
            )
        )

    def rule(self, path: str) -> Rule:
        """Returns the rule of the weight at `path`."""
        regex = self.override(path)
        return self._rule(self.overrides[regex] if regex is not None else {})

    def override(self, path: str) -> str | None:
        """Returns the first regex of `overrides` that matches `path`, or None."""
        matches = (regex for regex in self.overrides if re.fullmatch(regex, path))
        return next(matches, None)

    def schedule(
        self, weights: int, steps: int, **options: Any
    ) -> Callable[[float], int]:
        """Returns the `budget_schedule` between both densities of `weights` weights.

        >>> schedule = SnellaConfig(target_density=0.3).schedule(1000, steps=3)
        >>> schedule(0), schedule(2)
        (1000, 300)
        """
        return budget_schedule(
            round(self.starting_density * weights),
            round(self.target_density * weights),
            steps,
            **options,
        )

    def _rule(self, changes: Mapping[str, Any]) -> Rule:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(Rule)}
        return Rule(**(own | dict(changes)))


def _elsewhere(kernel: kernels.Kernel) -> str:
    """Says how a kernel starts elsewhere than at 0."""
    linear = isinstance(kernel, kernels.linear)
    return "kernels.linear(zero_init=False)" if linear else 'start="kernel"'


def check_overrides(config: SnellaConfig, paths: Iterable[str]) -> None:
    """Raises a `ValueError` for an override that none of the adapted paths takes."""
    paths = list(paths)
    unused = set(config.overrides) - {config.override(path) for path in paths}
    if unused:
        raise ValueError(
            f"overrides: {', '.join(map(repr, sorted(unused)))} matches none of the "
            f"targets (or an earlier override matches first): {listed(paths)}"
        )
