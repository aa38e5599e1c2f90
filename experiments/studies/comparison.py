"""A comparison of methods: its options, its rows, and the table of finished runs."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from experiments import files
from experiments.config import run_config
from experiments.config.images import ImageConfig
from experiments.methods import registry
from experiments.paths import Given
from experiments.reports import finished, table
from experiments.studies.pooled import Tried
from experiments.studies.table_store import FILE, Store
from experiments.tasks import catalogue
from experiments.training.grid import Grid

TASKS = (
    "dsprites_loc_rerendered",
    "dsprites_ori_rerendered",
    "tuxpaint",
    "fashion_mnist",
    "elpv",
)
RATES = {  # where they are not the usual ones
    "full": 3e-5,
    "partial1": 3e-4,
    "bias": 3e-3,
    "ssf": 1e-3,
    **dict.fromkeys(("adapter", "adaptformer", "lora", "dora", "mosa"), 1e-3),
    **dict.fromkeys(("spt_adapter", "spt_lora"), 1e-3),
    "snella_plus": 3e-4,  # its first steps are longer than LoRA's
    **dict.fromkeys(("klora", "snell", "snella"), 3e-3),
    **dict.fromkeys(("snella_masked", "snella_released"), 3e-3),
    # Without a gate its softmax and beta shift all weights: at 9e-4 it is at chance.
    "mixk": 3e-5,
}
RUN = ImageConfig(
    model="dinov2_saliency",
    image_size=56,
    protocol="final",
    epochs=30,
    warmup_epochs=3,
    test_images=2000,
    grid=Grid(lr_factors=(0.3, 3.0), weight_decays=(), densities=(0.1, 0.6)),
    settings={
        name: dataclasses.replace(registry.METHODS[name], lr=lr)
        for name, lr in RATES.items()
    },
    source="python -m experiments.compare",
)
REAL = dataclasses.replace(
    RUN,
    image_size=84,
    epochs=15,
    warmup_epochs=1,
    test_images=None,
    grid=Grid(lr_factors=(1 / 3, 3.0), lr_extensions=0, weight_decays=(), densities=()),
    settings={
        **RUN.settings,
        **{
            name: dataclasses.replace(RUN.settings[name], lr=9e-3)
            for name in ("adapter", "snell", "snella")
        },
    },
    source="python -m experiments.compare --config real_tasks",
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Options of `python -m experiments.compare`."""

    own: ClassVar[tuple[str, ...]] = (
        *("task", "methods", "seed", "protocol", "search", "out", "random_weights"),
    )

    tasks: tuple[str, ...] = TASKS
    """Columns of the table, in the order in which they run. None, with a pool: rates
    and methods are compared on validation alone, and no test image is read."""
    data: Given | None = None
    """Folder that the tasks are folders or CSV files of. Default: tasks are names or
    paths."""
    methods: tuple[str, ...] = ImageConfig.names()
    """Rows of the table, in the order in which they run."""
    controls: tuple[str, ...] = ("linear", "full")
    """Methods that are also run from random weights."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the factors, the order and random weights. (Searches have seed 0.)"""
    search_epochs: int | None = 10
    """Epochs of a trial of the search; with run.steps it has that many steps. None:
    run.epochs."""
    pool: tuple[str, ...] = ()
    """Tasks whose mean validation loss chooses one rate for a method, on all tasks.
    Default: on each task its own rate, weight decay and density, by accuracy."""
    rates: Given | None = None
    """Results.json of another comparison, whose rates are taken; nothing is searched.
    """
    keep_models: bool = False
    """Keep what training changed in each run, of methods that merge into the base."""
    run: ImageConfig = RUN
    """Config that all runs share."""
    table_only: bool = False
    """Run nothing; write the table of finished runs, with all that is missing."""
    memory: Given | None = None
    """A memory.json of one model, by experiments.benchmarks.memory: also draws
    accuracy.png, accuracy against memory."""
    out: Given = Path("runs/comparison")
    """Folder to write results.json, the table and the runs into."""

    def check(self) -> None:
        """Raises a `ValueError` on values that would fail later."""
        columns, rows = self.tasks or self.pool, self.methods or self.controls
        if not (columns and self.seeds and rows):
            raise ValueError("expected at least one task, one seed and one method.")
        if self.run.steps is None and self.trial_epochs <= self.run.warmup_epochs:
            raise ValueError(
                f"search_epochs={self.trial_epochs}: expected more than the "
                f"{self.run.warmup_epochs} of the warm-up."
            )
        for name in self.own:
            if getattr(self.run, name) != getattr(RUN, name):
                raise ValueError(f"run.{name}: the comparison sets it by itself.")
        grid = self.run.grid
        if self.pool and (grid.lr_extensions or grid.weight_decays or grid.densities):
            raise ValueError(
                "pool: only the rates of run.grid.lr_factors are tried, expected "
                "run.grid.lr_extensions=0, no weight_decays and no densities."
            )
        if self.pool and self.rates:
            raise ValueError("pool and rates both choose the rates: expected one.")
        if self.data and (paths := [t for t in self.all_tasks if Path(t).name != t]):
            raise ValueError(f"{', '.join(paths)}: expected names in {self.data}.")
        dataclasses.replace(self.run, methods=self.adapted(), search=True).check()

    @property
    def trial_epochs(self) -> int:
        """Epochs of a trial of the search, where run.steps does not give its length."""
        return self.run.epochs if self.search_epochs is None else self.search_epochs

    def seeds_of(self, row: "Row") -> tuple[int, ...]:
        """Returns the seeds of a row."""
        alike = row.fixed and self.run.per_class is None
        return self.seeds[:1] if alike else self.seeds

    def adapted(self) -> tuple[str, ...]:
        """Returns the methods of all rows."""
        return tuple(dict.fromkeys((*self.methods, *self.controls)))

    @property
    def all_tasks(self) -> tuple[str, ...]:
        """Tasks of the table and of the search, each once."""
        return tuple(dict.fromkeys((*self.tasks, *self.pool)))

    def config(self, task: str, row: "Row", seed: int) -> ImageConfig:
        """Returns the config of a row's run on a task."""
        given = str(self.data / task) if self.data else task
        own = {"task": given, "methods": (row.method,), "seed": seed}
        return dataclasses.replace(self.run, random_weights=row.random, **own)

    def named(self, task: str) -> str:
        """Returns the name of a task in results and tables.

        >>> Comparison(data=Path("data")).named("caltech101")
        'caltech101 (own)'
        """
        taken = self.data is not None and task in catalogue.ENTRIES
        return f"{task} (own)" if taken else task

    def tried(self, row: "Row") -> list[Tried]:
        """Returns the trials that choose a row's rate; none without a pool."""
        if not self.pool or row.method == registry.LINEAR:
            return []
        lr = self.run.settings[row.method].lr
        rates = [lr * factor for factor in (1.0, *self.run.grid.lr_factors)]
        return [Tried(row.name, task, lr) for task in self.pool for lr in rates]


REAL_TASKS = Comparison(
    tasks=("cub-20", "cars-20", "caltech101", "dtd-10", "idrid", "rsscn7"),
    data=Path("data"),
    # Not snella_plus: it is tested once, when it has been chosen on validation.
    methods=("linear", "full", "bias", "adapter", "lora", "dora", "snell", "snella"),
    controls=(),
    search_epochs=None,
    pool=("cub-20", "dtd-10"),
    run=REAL,
)
PRESETS = {"small": Comparison(), "real_tasks": REAL_TASKS}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: a method, from pre-trained or from random weights."""

    method: str
    random: bool = False
    undecayed: bool = False
    """True if trained when LoRA's factors did not decay (`finished.UNDECAYED`)."""

    @property
    def fixed(self) -> bool:
        """True if all seeds give the same: a linear probe is fitted from zeros."""
        return self.method == registry.LINEAR and not self.random

    @property
    def name(self) -> str:
        """Name in `results.json` and of the folder; it says if LoRA's factors decay."""
        decayed = self.method in finished.UNDECAYED and not self.undecayed
        return self.method + "_decayed" * decayed + "_random" * self.random

    @property
    def note(self) -> str:
        """Addition to the label of its method."""
        return (
            f", {finished.UNDECAYED_NOTE}" * self.undecayed
            + ", random weights" * self.random
        )


METHODS = ImageConfig.names()
ROWS = [
    Row(method, random, undecayed)
    for method in METHODS
    for undecayed in (False, True)[: 1 + (method in finished.UNDECAYED)]
    for random in (False, True)
]


class Table:
    """The comparison's rows in its store.

    Attributes:
      store: the finished runs.
      rows, columns: rows and columns that the table has in any case.
    """

    def __init__(self, config: Comparison):
        """Opens the folder; raises a `ValueError` if it holds another comparison."""
        fields = run_config.as_dict(config.run)
        shared = {k: v for k, v in fields.items() if k not in finished.IRRELEVANT}
        shared |= {"search_epochs": config.trial_epochs, "pool": config.pool}
        known = (files.read(config.out / FILE) or {}).get("shared", {})
        for name in known.keys() & {*METHODS} - {*config.adapted()}:
            shared[name] = known[name]  # as it ran, whatever it is set to now
        defaults = run_config.as_dict(RUN) | {"pool": ()}
        self.store = Store(config.out, shared, defaults)
        self.rows = [Row(method) for method in METHODS]
        self.rows += [Row(method, random=True) for method in config.controls]
        self.columns = [config.named(task) for task in config.tasks]

    def made(self) -> dict[str, Any] | None:
        """Returns the report of all finished seeds; None if there are none."""
        runs = self._runs()
        labels = [self._label(row) for row in self.rows]
        if not runs:
            return None
        failed = self.store.failures()
        return table.table(runs, methods=labels, tasks=self.columns, failed=failed)

    def points(
        self, made: dict[str, Any], memory: dict[str, dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Returns the mean accuracies of a table's rows with their methods' memory.

        Methods whose factors did not decay have a star.
        """
        ours = [column for column in made["columns"] if not column["paper"]]
        columns = {column["method"]: column["tasks"] for column in ours}
        return [
            {
                "task": task,
                "method": label.removesuffix(row.note) + "*" * row.undecayed,
                "accuracy": cell["mean"],
                "deviation": cell["deviation"],
                "bytes": memory[method]["total_bytes"],
            }
            for row in ROWS
            if not row.random and (method := row.method) in memory
            for label in [self._label(row)]
            for task, cell in columns.get(label, {}).items()
        ]

    def _label(self, row: Row) -> str:
        settings = self.store.shared[row.method]
        return finished.label(row.method, settings) + row.note

    def _runs(self) -> list[finished.Run]:
        shared = self.store.shared
        size = f", {shared['image_size']} pixels" if shared["image_size"] else ""
        setup = f"{shared['model']}{size}, {shared['epochs']} epochs"
        return [
            finished.Run(
                folder=self.store.path.parent,
                task=task,
                method=self._label(row),
                setup=setup,
                seed=int(seed),
                settings=done["chosen"],
                result=result,
            )
            for row in ROWS
            for task, own in self.store.tasks().items()
            if (done := own.get(row.name))
            for seed, result in done.get("seeds", {}).items()
        ]
