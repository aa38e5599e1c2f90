"""One model trained on one task, behind a progress bar, with a row for every epoch."""

import contextlib
import dataclasses
from typing import Any

import optax
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as BarTask
from rich.table import Column
from rich.text import Text

from experiments.training import trainer as train
from experiments.training.checkpoints import Checkpoints
from experiments.training.competition import Competition
from experiments.training.metric_log import Tracker
from experiments.training.session import Session

VAL, TEST = "val_accuracy", "test_accuracy"  # of rows, by what is followed


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What training left.

    Attributes:
      rows: of the epochs, as in `metrics.jsonl`, but those that it has lost.
      model: of the last epoch.
      ema_model: with the running mean of the weights, where there is one.
      best_model: of the best epoch on what was followed, where anything was.
      best_row: its row; its epoch alone where the row is lost.
      last_row: of the last epoch; its epoch alone where the row is lost.
    """

    rows: list[dict[str, Any]]
    model: Any
    ema_model: Any
    best_model: Any
    best_row: dict[str, Any] | None
    last_row: dict[str, Any]


def fit(
    name: str,
    title: str,
    model: Any,
    session: Session,
    watch: tuple[optax.GradientTransformation, ...] = (),
    competition: Competition | None = None,
) -> Fitted:
    """Trains a model on a session's data, from its last checkpoint on.

    Args:
      name: of its checkpoints and rows in `metrics.jsonl`.
      title: of its progress bar.
      model: as `train.Trainer` takes it; so are `watch` and `competition`.
      session: the data, the recipe, the devices and the folder.

    Raises:
      FloatingPointError: a loss or update that is not finite.
    """
    with contextlib.ExitStack() as stack:
        saved = Checkpoints(session.out / "checkpoints" / name)
        stack.callback(saved.close)
        trainer = train.Trainer(
            model,
            session.data,
            session.recipe,
            session.mesh,
            watch=watch,
            competition=competition,
            checkpoints=saved,
        )
        stack.callback(trainer.close)
        tracker = Tracker(session.out, name, trainer.passed, session.wandb)
        stack.callback(tracker.close)
        _watched(title, trainer, tracker, session)
        epoch, best = trainer.best_model()
        rows = {row["epoch"]: row for row in tracker.rows}
        return Fitted(
            rows=tracker.rows,
            model=trainer.model,
            ema_model=trainer.ema_model,
            best_model=best,
            best_row=rows.get(epoch, {"epoch": epoch}) if epoch else None,
            last_row=rows.get(trainer.passed, {"epoch": trainer.passed}),
        )


def _watched(
    title: str, trainer: train.Trainer, tracker: Tracker, session: Session
) -> None:
    """Runs the epochs that are left."""
    console, recipe = session.console, trainer.recipe
    done, total = (n * trainer.steps for n in (trainer.passed, recipe.total_epochs))
    with Progress(
        TextColumn(title, table_column=Column(no_wrap=True)),
        BarColumn(None),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        _ImageRate(recipe.batch),
        TimeRemainingColumn(compact=True),
        console=console,
        expand=True,
    ) as bar:
        shown = bar.add_task("compiling", total=total, completed=done)
        losses: list[float] = []

        def on_step(loss: float) -> None:
            losses.append(loss)
            now = trainer.passed + 1, recipe.total_epochs
            bar.update(shown, advance=1, description=_brief(now, losses, tracker.rows))

        for epoch in trainer.epochs(on_step):
            tracker.log(_row(epoch, session.followed))
            brief = _brief((epoch.epoch, recipe.total_epochs), losses, tracker.rows)
            bar.update(shown, description=brief)
            if not console.is_terminal:  # a log file has no bar
                console.print(f"{title} {brief}", soft_wrap=True)
            losses.clear()


class _ImageRate(ProgressColumn):
    def __init__(self, batch: int):
        self.batch = batch
        super().__init__(Column(no_wrap=True))

    def render(self, task: BarTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed * self.batch:.0f} img/s" if speed else "")


def _brief(
    now: tuple[int, int], losses: list[float], rows: list[dict[str, Any]]
) -> str:
    """Epoch, mean loss in it, and the last accuracy and density on record."""
    parts = ["epoch {}/{}".format(*now), f"loss {sum(losses) / len(losses):.3f}"]
    for key, name in ((VAL, "val"), (TEST, "test")):
        known = [row[key] for row in rows if key in row]
        parts += [f"{name} {accuracy:.1%}" for accuracy in known[-1:]]
    parts += [f"density {row['density']:.2f}" for row in rows[-1:] if "density" in row]
    return " ".join(parts)


def _row(epoch: train.Epoch, followed: str | None) -> dict[str, Any]:
    key = {"validation": VAL, "test": TEST}.get(followed or "", "")
    row = {
        "epoch": epoch.epoch,
        "train_loss": epoch.train_loss,
        "lr": epoch.lr,
        key: epoch.accuracy,
        f"ema_{key}": epoch.ema_accuracy,
        "density": epoch.density,
        "moves": epoch.moves or None,
        "gradient_norm": epoch.gradient_norm,
        "seconds_per_step": epoch.seconds_per_step,
    }
    row = {name: value for name, value in row.items() if value is not None}
    if moved := epoch.moved:
        for name, values in (
            ("importance", moved.scores),
            ("budget", moved.budgets),
            ("capacity", moved.capacities),
        ):
            row[name] = dict(zip(moved.names, values.tolist(), strict=True))
    return row
