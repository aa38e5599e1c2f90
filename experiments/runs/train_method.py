"""One method on one task: its first stage, where it has one, and its training."""

import dataclasses
from typing import Any

from jax.experimental import multihost_utils

from experiments import files
from experiments.methods.first_stage import Staged
from experiments.runs.setup import Prepared
from experiments.training.fit import Fitted, fit
from experiments.training.session import Places


def tune(name: str, run: Prepared) -> Fitted:
    """Trains a method, from its last checkpoint on.

    Raises:
      FloatingPointError: a loss, update or score that is not finite.
      ValueError, RuntimeError: a first stage finds nothing; says why.
    """
    method, session = run.config.settings[name], run.session(name)
    model = adapted(name, run)
    rules = method.competition(model, session.scope)
    return fit(name, method.title, model, session, method.watch(), rules)


def adapted(name: str, run: Prepared) -> Any:
    """Returns the base as a method trains it; keeps what a first stage locates.

    Values of a checkpoint belong to the places that were located before it.
    """
    method, scope = run.config.settings[name], run.config.scope()
    if isinstance(method, Staged):
        scope = dataclasses.replace(scope, places=_located(name, method, run))
    return method.adapt(run.base, scope)


def _located(name: str, method: Staged, run: Prepared) -> Places:
    """Returns what a first stage located, from its file once that is there."""
    path = (run.located or run.out) / f"located_{name}{method.variant}.npz"
    if not multihost_utils.broadcast_one_to_all(path.exists()):
        files.save(path, method.locate(run.session(name)))
    return files.load(path)
