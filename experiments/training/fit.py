"""One model trained on one task, with a progress bar and a row for every round."""

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

from experiments.training.checkpoints import Checkpoints
from experiments.training.competition import Competition
from experiments.training.metric_log import Tracker
from experiments.training.objective import Metric, followed
from experiments.training.session import Session
from experiments.training.stopping import deferred
from experiments.training.trainer import Round, Trainer

SPLITS = {"validation": "val", "test": "test"}  # in the names of metrics, as val_NAME


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Result of training one model.

    Attributes:
      rows: rows of the rounds, as in `metrics.jsonl`, but those that it has lost.
      model: the model after the last round.
      ema_model: the model with the running mean of the weights; None without one.
      best_model: the model after the best round on what was followed; None where
        nothing was.
      best_row: row of that round; its number alone where the row is lost.
      last_row: row of the last round; its number alone where the row is lost.
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
      name: names its checkpoints and its rows in `metrics.jsonl`.
      title: stands before its progress bar.
      model: as `Trainer` takes it; so are `watch` and `competition`.
      session: the data, the objective, the recipe, the devices and the folder.

    Raises:
      FloatingPointError: a loss or update that is not finite.
      Stopped: a signal told the run to stop; what it has done is saved.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(deferred())
        metric = followed(session.objective)
        saved = Checkpoints(session.out / "checkpoints" / name, metric)
        stack.callback(saved.close)
        trainer = Trainer(
            model,
            session.data,
            session.objective,
            session.recipe,
            session.mesh,
            watch=watch,
            competition=competition,
            checkpoints=saved,
            stop=stop,
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


def _watched(title: str, trainer: Trainer, tracker: Tracker, session: Session) -> None:
    """Runs the rounds that are left."""
    console, recipe, rounds = session.console, trainer.recipe, trainer.rounds
    metric, split = followed(trainer.objective), SPLITS.get(session.followed or "")
    with Progress(
        TextColumn(title, table_column=Column(no_wrap=True)),
        BarColumn(None),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        _ExampleRate(recipe.batch),
        TimeRemainingColumn(compact=True),
        console=console,
        expand=True,
    ) as bar:
        done, _ = rounds.span(trainer.passed)
        shown = bar.add_task("compiling", total=rounds.updates, completed=done)
        losses: list[float] = []

        def brief(number: int) -> str:
            now = f"{recipe.unit} {number}/{rounds.count}"
            loss = sum(losses) / len(losses)
            return f"{now} loss {loss:.3f}{_known(tracker.rows, metric, split)}"

        def on_step(loss: float) -> None:
            losses.append(loss)
            bar.update(shown, advance=1, description=brief(trainer.passed + 1))

        for round in trainer.train(on_step):
            tracker.log(_row(round, split))
            bar.update(shown, description=brief(round.number))
            if not console.is_terminal:  # a log file has no bar
                console.print(f"{title} {brief(round.number)}", soft_wrap=True)
            losses.clear()


class _ExampleRate(ProgressColumn):
    def __init__(self, batch: int):
        self.batch = batch
        super().__init__(Column(no_wrap=True))

    def render(self, task: BarTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed * self.batch:.0f} ex/s" if speed else "")


def _known(rows: list[dict[str, Any]], metric: Metric, split: str | None) -> str:
    """Returns the last metric that is followed, and the last density, on record."""
    known = [row for row in rows if f"{split}_{metric.name}" in row][-1:]
    values = [metric.text(row[f"{split}_{metric.name}"]) for row in known]
    parts = [f" {split} {value}" for value in values]
    parts += [f" density {row['density']:.2f}" for row in rows[-1:] if "density" in row]
    return "".join(parts)


def _row(round: Round, split: str | None) -> dict[str, Any]:
    """Returns a row of `metrics.jsonl`; `epoch` is the number of the round."""
    row = {
        "epoch": round.number,
        "updates": round.updates,
        "train_loss": round.train_loss,
        "lr": round.lr,
        **{f"{split}_{name}": value for name, value in round.metrics.items()},
        **{f"ema_{split}_{name}": value for name, value in round.ema_metrics.items()},
        "density": round.density,
        "moves": round.moves or None,
        "gradient_norm": round.gradient_norm,
        "seconds_per_step": round.seconds_per_step,
    }
    row = {name: value for name, value in row.items() if value is not None}
    if moved := round.moved:
        for name, values in (
            ("importance", moved.scores),
            ("budget", moved.budgets),
            ("capacity", moved.capacities),
        ):
            row[name] = dict(zip(moved.names, values.tolist(), strict=True))
    return row
