"""The progress bar of a training."""

import dataclasses
import io
from types import SimpleNamespace

from rich.console import Console
from rich.progress import Progress

from experiments.training import fit
from experiments.training.objective import Metric
from experiments.training.rounds import Rounds
from experiments.training.trainer import Round

ROUND = Round(
    number=0,
    updates=2,
    train_loss=2.5,
    lr=0.1,
    metrics={"accuracy": 0.5},
    ema_metrics={},
    density=None,
    seconds_per_step=1.0,
    gradient_norm=1.0,
    moves=0,
    moved=None,
)


def test_the_bar_says_compiling_until_the_first_step_is_done(monkeypatch):
    """Two rounds of two steps; what it says before each, and after a round's last."""
    bars, said = [], []

    class Watched(Progress):
        def __init__(self, *columns, **options):
            super().__init__(*columns, **options)
            bars.append(self)

    def look():
        (bar,) = bars
        said.append(bar.tasks[0].description)

    class Trainer:
        recipe = SimpleNamespace(batch=4, unit="epoch")
        rounds = Rounds(main=4, size=2)
        objective = SimpleNamespace(metrics=[Metric("accuracy")])
        passed = 0

        def train(self, on_step):
            for number in (1, 2):
                for loss in (3.0, 2.0):
                    look()
                    on_step(loss)
                look()
                yield dataclasses.replace(ROUND, number=number)
                self.passed = number

    monkeypatch.setattr(fit, "Progress", Watched)
    rows = []
    tracker = SimpleNamespace(rows=rows, log=rows.append)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    session = SimpleNamespace(console=console, followed="validation")
    fit._watched("SNELLA", Trainer(), tracker, session)
    assert said == [
        "compiling",
        "epoch 1/2 loss 3.000",
        "epoch 1/2 loss 2.500",
        "epoch 1/2 loss 2.500 val 0.5",
        "epoch 2/2 loss 3.000 val 0.5",
        "epoch 2/2 loss 2.500 val 0.5",
    ]
