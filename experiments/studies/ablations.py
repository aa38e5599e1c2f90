"""The ablations' studies: the paper's tables, and questions of our own.

A study is a table; each of its rows is SNELLA with some settings changed. A row that
several studies share is run once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from experiments.config.images import ImageConfig
from experiments.reports import paper

BASE = "snella"
# What gets a search for its rate.
OWN_RATE = {"kernel", "gate", "path", "dtype", "centred", "start", "protocol"}
VALIDATED: dict[str, Any] = {"protocol": "choose"}
FROM_ZERO: dict[str, Any] = {"gate": "hard", "start": "zero"}
REGULARISED: dict[str, dict[str, Any]] = {
    "weight decay 0.01": {"weight_decay": 0.01},
    "drop path 0.1, parallel": {"drop_path": 0.1, "path": "parallel"},
    "1 of 4 rows": {"sketch": 4},
}
DISTANCES = {"piecewise_linear": "P-Linear", "rbf": "RBF"}
DENSE: dict[str, Any] = {"gate": "none", "initial_density": 1.0, "target_density": 1.0}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of a study.

    Attributes:
      title: title in tables and figures.
      changes: settings of the method that differ from the base.
      run: fields of the run's config that differ.
      method: method that is trained.
      centre: rate that its search begins with, times the base's.
    """

    title: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    method: Literal["snella", "snella_masked"] = BASE
    centre: float = 1.0

    @property
    def name(self) -> str:
        """Name in `results.json` and of the folder; the same for the same settings."""
        changes = {**self.changes, **self.run}
        return ",".join(
            [self.method, *(f"{k}={v}" for k, v in sorted(changes.items()))]
        )

    @property
    def validated(self) -> bool:
        """True if it is judged on validation, and neither trained on it nor tested."""
        return self.run.get("protocol") == VALIDATED["protocol"]

    @property
    def searched(self) -> bool:
        """True if its rate is searched; else it has that of the base."""
        return (
            self.name == BASE
            or self.method != BASE
            or bool({**self.changes, **self.run}.keys() & OWN_RATE)
        )

    def config(self, run: ImageConfig, seed: int, **settings: Any) -> ImageConfig:
        """Returns the config of a seed's run, with more settings of the method."""
        own = run.settings[self.method]
        own = dataclasses.replace(own, **self.changes, **settings)
        run = run.with_settings(**{self.method: own})
        fields = {"methods": (self.method,), "seed": seed, **self.run}
        return dataclasses.replace(run, **fields)


@dataclasses.dataclass(frozen=True)
class Study:
    """A table of variants.

    Attributes:
      title: question that the study answers.
      variants: rows of the table.
      source: the paper's table; "" if it has none.
      order: titles from the best to the worst, in the paper's order.
    """

    title: str
    variants: tuple[Variant, ...]
    source: str = ""
    order: tuple[tuple[str, ...], ...] = ()

    @property
    def paper(self) -> dict[str, float]:
        """The paper's numbers by title, for the rows that it reports."""
        return paper.ABLATIONS.get(self.source, {})


SNELLA = Variant("SNELLA")
KERNELS = {"linear": "linear", "piecewise_linear": "P-Linear", "mix_k": "Mix-K"}


def _kernel(name: str, title: str, **changes: Any) -> Variant:
    own = {"kernel": name} if name != "mix_k" else {}
    return Variant(title, {**own, **changes})


def _validated(title: str, centre: float = 0.1, **changes: Any) -> Variant:
    """Returns a row of a study that a choice is made from, near LoRA's rate."""
    return Variant(title, changes, VALIDATED, centre=centre)


def _titled(title: str, **changes: Any) -> Variant:
    return Variant(title, changes)


STUDIES: dict[str, Study] = {
    "kernels_sparsity": Study(
        "kernels with and without sparsity",
        (
            *(_kernel(n, f"{t}, dense", **DENSE) for n, t in KERNELS.items()),
            *(_kernel(n, f"{t}, sparse") for n, t in KERNELS.items()),
        ),
        "Table VII",
        (
            ("Mix-K, sparse", "P-Linear, sparse", "linear, sparse"),
            ("Mix-K, dense", "P-Linear, dense", "linear, dense"),
            ("Mix-K, sparse", "Mix-K, dense"),
            ("P-Linear, sparse", "P-Linear, dense"),
            ("linear, dense", "linear, sparse"),
        ),
    ),
    "kernels": Study(
        "kernels, without sparsity",
        (
            _kernel("sigmoid", "sigmoid", **DENSE),
            _kernel("rbf", "RBF", **DENSE),
            _kernel("normalized_rbf", "normalised RBF", **DENSE),
            _kernel("mix_k", "Mix-K", **DENSE),
        ),
        "Table VIII",
        (("Mix-K", "normalised RBF", "RBF"), ("normalised RBF", "sigmoid")),
    ),
    "sparsification": Study(
        "who competes",
        (
            _kernel("mix_k", "nobody", **DENSE),
            _titled("within matrices, as SNELL", allocation="fixed"),
            _titled("within matrices, cubic schedule", floor=1.0),
            Variant("across matrices"),
        ),
        "Table IX",
        (("across matrices", "within matrices, as SNELL", "nobody"),),
    ),
    "importance": Study(
        "importance, where 1% of the weights may move (the paper: 0.01%)",
        tuple(
            _titled(
                f"{title}, per {every}",
                target_density=0.01,
                **({"metric": metric} if metric != "sensitivity" else {}),
                **({"every": every} if every != "epoch" else {}),
            )
            for metric, title in (
                ("sensitivity", "sensitivity"),
                ("magnitude", "magnitude"),
                ("merged_magnitude", "merged magnitude"),
            )
            for every in ("epoch", "step")
        ),
        "Table X",
        (
            ("sensitivity, per epoch", "magnitude, per epoch"),
            ("sensitivity, per epoch", "merged magnitude, per epoch"),
            ("sensitivity, per epoch", "sensitivity, per step"),
            ("magnitude, per epoch", "magnitude, per step"),
            ("merged magnitude, per epoch", "merged magnitude, per step"),
            ("sensitivity, per step", "magnitude, per step"),
            ("sensitivity, per step", "merged magnitude, per step"),
        ),
    ),
    "budget": Study(
        "budget, b_T / b_0",
        tuple(
            Variant(f"{share:.2f}", {"target_density": share} if share != 0.3 else {})
            for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
        ),
        "Table XI",
        (("0.30", "0.99"),),
    ),
    "schedule": Study(
        "budget over time",
        (
            _titled("constant", initial_density=0.3),
            _titled("linear", power=1.0),
            _titled("quadratic", power=2.0),
            Variant("cubic"),
        ),
        "Table XII",
        (("cubic", "quadratic", "linear", "constant"),),
    ),
    "masks": Study(
        "masks fixed beforehand by SPT (which have no gate), and adaptive ones",
        (
            Variant(
                "P-Linear, fixed",
                {"kernel": "piecewise_linear"},
                method="snella_masked",
            ),
            _kernel("piecewise_linear", "P-Linear, adaptive"),
            _kernel("piecewise_linear", "P-Linear, adaptive, hard gate", gate="hard"),
            Variant("Mix-K, fixed", method="snella_masked"),
            Variant("Mix-K, adaptive"),
            _titled("Mix-K, adaptive, hard gate", gate="hard"),
        ),
        "Table XVII",
        (("Mix-K, adaptive", "Mix-K, fixed", "P-Linear, fixed"),),
    ),
    "beta": Study(
        "rate of beta, times that of the rest",
        (
            Variant("1 (the paper)"),
            _titled("0.1", beta_rate=0.1),
            _titled("0.01", beta_rate=0.01),
            _titled("0 (frozen)", beta_rate=0.0),
        ),
    ),
    "allocation": Study(
        "how scores become budgets",
        (
            Variant("the paper's"),
            _titled("square root of the score", exponent=0.5),
            _titled("fourth root of the score", exponent=0.25),
            _titled("floor 0.1", floor=0.1),
            _titled("floor 0.3", floor=0.3),
            _titled("revival: floor 0.1 every 3rd epoch", floor=0.1, floor_every=3),
            _titled("evenly", floor=1.0),
        ),
    ),
    "gates": Study(
        "gates, paths and precision",
        tuple(
            Variant(
                f"{gate}, {path}, {dtype}",
                {
                    **({"gate": gate} if gate != "product" else {}),
                    **({"path": path} if path != "merged" else {}),
                },
                {"dtype": dtype} if dtype != "float32" else {},
            )
            for dtype in ("float32", "bfloat16")
            for path in ("merged", "parallel")
            for gate in ("product", "released", "soft", "hard")
        ),
    ),
    "rank": Study(
        "rank and pieces",
        (
            _titled("rank 4, 2 pieces", rank=4),
            Variant("rank 8, 2 pieces (the paper)"),
            _titled("rank 16, 2 pieces", rank=16),
            _titled("rank 32, 2 pieces", rank=32),
            _titled("rank 8, 1 piece", pieces=1),
            _titled("rank 8, 4 pieces", pieces=4),
            _titled("rank 8, 8 pieces", pieces=8),
        ),
    ),
    "frequency": Study(
        "when budgets move",
        (
            Variant("every epoch (the paper)"),
            _titled("every step", every="step"),
            _titled("settled, correlation 0.8", every="settled", settled=0.8),
            _titled("settled, correlation 0.95", every="settled", settled=0.95),
        ),
    ),
    "sketches": Study(
        "rows of the inputs kept for the weights' gradients, and GELU's derivative",
        (
            Variant("all rows, exact"),
            _titled("1 of 2", sketch=2),
            _titled("1 of 4", sketch=4),
            _titled("1 of 8", sketch=8),
            Variant("all rows, in steps", run={"activation": "gelu2"}),
            Variant("1 of 4, in steps", {"sketch": 4}, {"activation": "gelu2"}),
        ),
    ),
    "centred": Study(
        "updates from 0, and without means of rows and columns, on validation",
        (
            _validated("the paper's", centre=1.0),
            _validated("hard gate", gate="hard"),
            _validated("hard gate, beta frozen", gate="hard", beta_rate=0.0),
            _validated("from 0", **FROM_ZERO),
            _validated("from 0, without rows' means", centred="rows", **FROM_ZERO),
            _validated(
                "from 0, without columns' means", centred="columns", **FROM_ZERO
            ),
            _validated("from 0, without both", centred="both", **FROM_ZERO),
            _validated(
                "from 0, without both, all weights",
                centred="both",
                target_density=1.0,
                **FROM_ZERO,
            ),
            _validated("hard gate, without both", centred="both", gate="hard"),
            _validated("product gate, without both", centre=1.0, centred="both"),
            *(
                _validated(
                    f"from 0, without both, {title}",
                    centred="both",
                    **changes,
                    **FROM_ZERO,
                )
                for title, changes in REGULARISED.items()
            ),
            *(
                _validated(
                    f"{title}, from 0{', without both' if centred != 'none' else ''}",
                    kernel=kernel,
                    centred=centred,
                    **FROM_ZERO,
                )
                for kernel, title in DISTANCES.items()
                for centred in ("none", "both")
            ),
            _validated("linear, dense", kernel="linear", **DENSE),
            _validated(
                "linear, dense, without both", kernel="linear", centred="both", **DENSE
            ),
        ),
    ),
}
