"""SNELLA, and methods that differ from it in their settings alone."""

import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal

import optax
from flax import nnx

import snella_jax as snella
from experiments.methods.method import Ranked, check_counts
from experiments.methods.sketched import Sketched
from experiments.training.competition import Competition, Every, Metric
from experiments.training.recipe import Recipe
from experiments.training.rounds import Rounds
from experiments.training.session import Scope
from snella_jax.nnx.targets import select

WEIGHTS = 1000  # of a model, to check that a budget has time to move
KernelName = Literal[
    "linear", "piecewise_linear", "rbf", "sigmoid", "normalized_rbf", "mix_k"
]
Gate = Literal["product", "released", "soft", "hard", "none"]
Centred = Literal["none", "rows", "columns", "both"]
Start = Literal["kernel", "zero"]


@dataclasses.dataclass(frozen=True)
class Snella(Sketched, Ranked):
    """Low-rank factors under a kernel; the matrices compete for what may move."""

    title: ClassVar[str] = "SNELLA"
    knobs: ClassVar[tuple[str, ...]] = (
        *("metric", "every", "settled", "exponent", "floor", "floor_every"),
        *("beta_rate", "beta1", "beta2", "power", "undropped", "centred", "start"),
    )

    lr: float = 2e-2
    """Peak learning rate."""
    kernel: KernelName = "mix_k"
    """Kernel that makes the update from the factors."""
    pieces: int = 2
    """Pieces that piecewise_linear, normalized_rbf and mix_k cut the rank into."""
    temperature: bool = False
    """Learn mix_k's temperature, as the released code does."""
    learn_piece_coeff: bool = True
    """Learn the coefficients of the pieces; the released code does not."""
    centred: Centred = "none"
    """Means that are taken out of the update: of its rows (an input's weights), its
    columns, or both."""
    start: Start = "kernel"
    """kernel: as the factors are drawn. zero: b starts at 0, and the update with it;
    needs gate=hard, soft or none and initial_density=1."""
    gate: Gate = "product"
    """Update of a weight that survives. product: the paper's Eq. 13; released:
    the authors' code; none: no competition (densities of 1)."""
    path: Literal["merged", "parallel"] = "merged"
    """merged: added to the weight; parallel: a matmul of its own, as released, without
    a sketch."""
    initial_density: float = 1.0
    """Fraction of the adapted weights that may move in the first epoch."""
    target_density: float = 0.3
    """Fraction of the adapted weights that may move in the last epoch."""
    allocation: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: the matrices compete. fixed: each has the target density throughout."""
    power: float = 3.0
    """Exponent of the budget schedule, Eq. 12."""
    dropout: float = 0.0
    """Rate of dropout on the adapter's input; needs path=parallel."""
    undropped: str = ""
    """Regex of targets without that dropout."""
    drop_path: float = 0.0
    """Rate of drop-path on the adapter's output; needs path=parallel."""
    metric: Metric = "sensitivity"
    """Score that matrices compete by. magnitude: that of the factors. merged_magnitude:
    that of the update (the paper's Table X)."""
    every: Every = "epoch"
    """Occasion on which budgets move. settled: where the matrices' ranking no longer
    changes, and where the schedule ends."""
    settled: float = 0.9
    """Rank correlation of scores some steps apart (as many as they remember) from which
    on every=settled moves budgets."""
    exponent: float = 1.0
    """Exponent of the scores: below 1 they lie closer together."""
    floor: float = 0.0
    """Share of the total budget that is divided evenly, whatever the scores."""
    floor_every: int = 1
    """Epochs from one with the floor to the next: 1 for always; above, matrices without
    a budget get a chance to come back."""
    beta_rate: float = 1.0
    """Factor on the learning rate of beta, the shift of mix_k and normalized_rbf; 0
    freezes it."""
    beta1: float = 0.85
    """Smoothing of the sensitivity, Eq. 9."""
    beta2: float = 0.85
    """Smoothing of the uncertainty, Eq. 10."""

    def adapt(self, base: Any, scope: Scope) -> Any:
        """Returns a copy of a model whose targeted layers have adapters.

        Raises:
          ValueError: a regex matches nothing, or settings do not fit one another.
        """
        adapter = self.config(scope)
        layers = select(base, scope.targets)
        own = {adapter.override(path) for path in layers}  # a ConvNeXt has no `out`
        kept = {
            regex: rule for regex, rule in adapter.overrides.items() if regex in own
        }
        adapter = dataclasses.replace(adapter, overrides=kept)
        return snella.adapt(base, adapter, rngs=scope.rngs())

    def watch(self) -> tuple[optax.GradientTransformation, ...]:
        """Returns the importance of the factors, where matrices compete.

        Raises:
          ValueError: `beta1` or `beta2` is not between 0 and 1.
        """
        return (self._importance(),) if self.competes else ()

    def competition(self, model: nnx.Module, scope: Scope) -> Competition | None:
        """Returns how budgets move; the total stays as it is in the cool-down."""
        if not self.competes:
            return None
        return self._competition(snella.adapted_weights(model), scope)

    def merged(self, model: Any) -> Any:
        """Returns a plain copy, perhaps of an epoch before the first reallocation."""
        return snella.merge(model, unmoved_budgets=True)

    @property
    def rates(self) -> tuple[tuple[str, float], ...]:
        """The rate of beta, where it is not that of the rest."""
        own = self.beta_rate != 1
        return ((r".*/adapter/beta", self.beta_rate),) * own

    @property
    def searched(self) -> dict[str, float]:
        """Settings that a search can choose, with their values."""
        return super().searched | {"target_density": self.target_density}

    @property
    def has_density(self) -> bool:
        """True if the gate leaves weights out."""
        return self.gate != "none"

    @property
    def competes(self) -> bool:
        """True if budgets move during training."""
        return self.allocation == "adaptive" and self.has_density

    def check(self, name: str) -> None:
        """Raises a `ValueError` on settings that would fail in the midst of a run."""
        super().check(name)
        check_counts(name, floor_every=self.floor_every, pieces=self.pieces)
        if not 0 <= self.beta_rate < math.inf:
            raise ValueError(f"{name}.beta_rate={self.beta_rate}: expected at least 0.")
        has_beta = self.kernel in ("normalized_rbf", "mix_k") and self.centred == "none"
        if self.beta_rate != 1 and not has_beta:
            raise ValueError(
                f"{name}.beta_rate: kernel={self.kernel}, centred={self.centred} has "
                "no beta."
            )
        if not (0 <= self.floor <= 1 and 0 <= self.exponent < math.inf):
            raise ValueError(
                f"{name}.floor={self.floor}, {name}.exponent={self.exponent}: expected "
                "0 <= floor <= 1 and exponent >= 0."
            )
        if not -1 <= self.settled <= 1:
            raise ValueError(f"{name}.settled={self.settled}: expected -1 to 1.")

    def check_run(self, name: str, scope: Scope, recipe: Recipe) -> None:
        """Raises a `ValueError` on settings that fail `check`, or do not fit a run."""
        super().check_run(name, scope, recipe)
        try:
            self._importance()
            self._competition(WEIGHTS, scope)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def check_rounds(self, name: str, scope: Scope, rounds: Rounds) -> None:
        """Raises a `ValueError` if there are too few rounds to move the budget."""
        try:
            self._competition(WEIGHTS, scope).begin(0, rounds)
        except ValueError as error:
            raise ValueError(
                f"{name}: its budget moves between rounds, of which there are "
                f"{rounds.count - rounds.cooldown} before the cool-down: expected at "
                "least 2 (a round is an epoch, or --round_steps updates), or "
                f"--{name}.initial_density as --{name}.target_density."
            ) from error

    def config(self, scope: Scope) -> snella.SnellaConfig:
        """Returns the library's config for these settings."""
        overrides = {}
        if self.undropped and self.dropout:
            overrides = {self.undropped: {"dropout": 0.0}}
        return snella.SnellaConfig(
            targets=scope.targets,
            trainable=scope.trainable,
            kernel=self._kernel(),
            rank=self.rank,
            gate=self.gate,
            path=self.path,
            dropout=self.dropout,
            drop_path=self.drop_path,
            sketch=self.sketch,
            sketch_kind=self.sketch_kind,
            keep_rows=self.keep_rows,
            initial_density=self.initial_density,
            target_density=self.target_density,
            allocation=self.allocation,
            overrides=overrides,
        )

    def _importance(self) -> optax.GradientTransformation:
        metric = "sensitivity" if self.metric == "merged_magnitude" else self.metric
        return snella.track_importance(self.beta1, self.beta2, metric)

    def _competition(self, weights: int, scope: Scope) -> Competition:
        course = self.config(scope).schedule
        schedule = functools.partial(course, weights, power=self.power)
        window = max(1, round(1 / (1 - self.beta1))) if self.beta1 < 1 else 1
        return Competition(
            schedule,
            metric=self.metric,
            every=self.every,
            settled=self.settled,
            window=window,
            exponent=self.exponent,
            floor=self.floor,
            floor_every=self.floor_every,
        )

    def _kernel(self) -> snella.kernels.Kernel:
        kernel: Any = snella.kernels.named(self.kernel)
        own = {field.name for field in dataclasses.fields(kernel)}
        options = {
            "pieces": (self.pieces, Snella.pieces),
            "temperature": (self.temperature, Snella.temperature),
            "learn_piece_coeff": (self.learn_piece_coeff, Snella.learn_piece_coeff),
            "centred": (self.centred, Snella.centred),
            "start": (self.start, Snella.start),
        }
        changes = {
            name: value for name, (value, usual) in options.items() if value != usual
        }
        if foreign := changes.keys() - own:
            raise ValueError(
                f"kernel={self.kernel} has no {', '.join(sorted(foreign))}."
            )
        if self.kernel == "linear" and self.gate != "none":
            changes["zero_init"] = False  # from 0 the gates would never let it move
        return dataclasses.replace(kernel, **changes)


@dataclasses.dataclass(frozen=True)
class Klora(Snella):
    """Kernelized LoRA: SNELL's kernel without sparsity."""

    title: ClassVar[str] = "KLoRA"

    kernel: KernelName = "piecewise_linear"
    gate: Gate = "none"
    target_density: float = 1.0


@dataclasses.dataclass(frozen=True)
class MixK(Snella):
    """SNELLA's kernel without sparsity."""

    title: ClassVar[str] = "Mix-K"

    gate: Gate = "none"
    target_density: float = 1.0


@dataclasses.dataclass(frozen=True)
class Snell(Snella):
    """SNELL: one density for all matrices."""

    title: ClassVar[str] = "SNELL"

    kernel: KernelName = "piecewise_linear"
    allocation: Literal["adaptive", "fixed"] = "fixed"


@dataclasses.dataclass(frozen=True)
class LinearSnella(Snella):
    """SNELLA with the linear kernel, whose update before the gate is LoRA's."""

    title: ClassVar[str] = "SNELLA (linear)"

    kernel: KernelName = "linear"


@dataclasses.dataclass(frozen=True)
class ReleasedSnella(Snella):
    """SNELLA as the authors' code sets it up, apart from rates and densities."""

    title: ClassVar[str] = "Released SNELLA"

    temperature: bool = True
    learn_piece_coeff: bool = False
    gate: Gate = "released"
    path: Literal["merged", "parallel"] = "parallel"
    dropout: float = 0.1
    undropped: str = r".*/out"
    drop_path: float = 0.1


@dataclasses.dataclass(frozen=True)
class PlusSnella(Snella):
    """SNELLA as `SnellaConfig.plus()`: from 0, and without means."""

    title: ClassVar[str] = "Plus SNELLA"

    lr: float = 1e-2
    """Peak learning rate. A step of it moves weights further than one of LoRA's."""
    centred: Centred = "both"
    start: Start = "zero"
    gate: Gate = "hard"
