"""The settings of SNELLA and of what differs from it in settings alone."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import optax

import snella_jax as snella
from experiments.methods.settings import Plain
from experiments.training.competition import Competition, Every, Metric


@dataclasses.dataclass(frozen=True)
class Kernelized(Plain):
    """Low-rank factors under a kernel; the defaults are SNELLA as in the paper."""

    lr: float = 2e-2
    """Peak learning rate."""
    rank: int = 8
    """Columns of the factors."""
    kernel: Literal[
        "linear", "piecewise_linear", "rbf", "sigmoid", "normalized_rbf", "mix_k"
    ] = "mix_k"
    """Makes the update from the factors."""
    pieces: int = 2
    """In how many parts piecewise_linear, normalized_rbf and mix_k cut the rank."""
    temperature: bool = False
    """Learn mix_k's temperature, as the released code does."""
    learn_piece_coeff: bool = True
    """Learn the coefficients of the pieces; the released code does not."""
    gate: Literal["product", "released", "soft", "hard", "none"] = "product"
    """What a surviving weight's update becomes. product: the paper's Eq. 13; released:
    the authors' code; none: no competition (densities of 1)."""
    path: Literal["merged", "parallel"] = "merged"
    """merged: added to the weight; parallel: a matmul of its own, as released."""
    initial_density: float = 1.0
    """Fraction of the adapted weights that may move in the first epoch."""
    target_density: float = 0.3
    """Fraction of the adapted weights that may move in the last epoch."""
    allocation: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: the matrices compete. fixed: each has the target density throughout."""
    power: float = 3.0
    """Of the budget schedule, Eq. 12."""
    dropout: float = 0.0
    """On the adapter's input; needs path=parallel."""
    undropped: str = ""
    """Regex of targets without that dropout."""
    drop_path: float = 0.0
    """Of the adapter's output; needs path=parallel."""
    metric: Metric = "sensitivity"
    """What matrices compete by. magnitude: that of the factors. merged_magnitude: that
    of the update (the paper's Table X)."""
    every: Every = "epoch"
    """When budgets move. settled: where the matrices' ranking no longer changes, and
    where the schedule ends."""
    settled: float = 0.9
    """Rank correlation of scores some steps apart (as many as they remember) from which
    on every=settled moves budgets."""
    exponent: float = 1.0
    """Of the scores: below 1 they lie closer together."""
    floor: float = 0.0
    """Share of the total budget that is divided evenly, whatever the scores."""
    floor_every: int = 1
    """Epochs from one with the floor to the next: 1 for always; above, matrices without
    a budget get a chance to come back."""
    beta_rate: float = 1.0
    """Times the learning rate: that of beta, the shift of mix_k and normalized_rbf; 0
    freezes it."""
    beta1: float = 0.85
    """Smoothing of the sensitivity, Eq. 9."""
    beta2: float = 0.85
    """Smoothing of the uncertainty, Eq. 10."""

    @property
    def has_density(self) -> bool:
        """Whether its gate leaves weights out."""
        return self.gate != "none"

    @property
    def competes(self) -> bool:
        """Whether budgets move while it trains."""
        return self.allocation == "adaptive" and self.has_density

    @property
    def rates(self) -> tuple[tuple[str, float], ...]:
        """What does not train at the learning rate, see `Recipe`."""
        own = self.beta_rate != 1
        return ((r".*/adapter/beta", self.beta_rate),) * own

    def check(self, name: str) -> None:
        """As `Plain.check`."""
        super().check(name)
        if not 0 <= self.beta_rate < math.inf:
            raise ValueError(f"{name}.beta_rate={self.beta_rate}: expected at least 0.")
        if self.beta_rate != 1 and self.kernel not in ("normalized_rbf", "mix_k"):
            raise ValueError(f"{name}.beta_rate: kernel={self.kernel} has no beta.")
        if not (0 <= self.floor <= 1 and 0 <= self.exponent < math.inf):
            raise ValueError(
                f"{name}.floor={self.floor}, {name}.exponent={self.exponent}: expected "
                "0 <= floor <= 1 and exponent >= 0."
            )
        if not -1 <= self.settled <= 1:
            raise ValueError(f"{name}.settled={self.settled}: expected -1 to 1.")

    def importance(self) -> optax.GradientTransformation:
        """What watches the gradients for the scores."""
        metric = "sensitivity" if self.metric == "merged_magnitude" else self.metric
        return snella.track_importance(self.beta1, self.beta2, metric)

    def competition(self, schedule: Callable[[float], int], final: int) -> Competition:
        """When and how budgets move along a schedule that ends with an epoch."""
        names = ("metric", "every", "settled", "exponent", "floor", "floor_every")
        own = {name: getattr(self, name) for name in names}
        window = max(1, round(1 / (1 - self.beta1))) if self.beta1 < 1 else 1
        return Competition(schedule, window=window, final=final, **own)

    def adapter(self, targets: str, trainable: str) -> snella.SnellaConfig:
        """The library's config for these settings."""
        same = ("rank", "gate", "path", "dropout", "drop_path", "allocation")
        densities = ("initial_density", "target_density")
        fields = {name: getattr(self, name) for name in (*same, *densities)}
        if self.undropped and self.dropout:
            fields["overrides"] = {self.undropped: {"dropout": 0.0}}
        return snella.SnellaConfig(
            targets=targets, trainable=trainable, kernel=self._kernel(), **fields
        )

    def _kernel(self) -> snella.kernels.Kernel:
        kernel: Any = snella.kernels.named(self.kernel)
        own = {field.name for field in dataclasses.fields(kernel)}
        changes = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name in ("pieces", "temperature", "learn_piece_coeff")
            and getattr(self, field.name) != field.default
        }
        if foreign := changes.keys() - own:
            raise ValueError(
                f"kernel={self.kernel} has no {', '.join(sorted(foreign))}."
            )
        if self.kernel == "linear" and self.gate != "none":
            changes["zero_init"] = False  # from 0 the gates would never let it move
        return dataclasses.replace(kernel, **changes)


DENSE: dict[str, Any] = {"gate": "none", "initial_density": 1.0, "target_density": 1.0}
RELEASED: dict[str, Any] = {
    "temperature": True,
    "learn_piece_coeff": False,
    "gate": "released",
    "path": "parallel",
    "dropout": 0.1,
    "undropped": r".*/out",
    "drop_path": 0.1,
}
