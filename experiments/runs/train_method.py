"""One method on one task: its first stage, where it has one, and its training."""

from typing import Any

from jax.experimental import multihost_utils

from experiments import files
from experiments.methods.registry import METHODS, Name
from experiments.training.fit import Fitted, fit
from experiments.training.session import Setting


def tune(method: Name, setting: Setting) -> Fitted:
    """Trains a method, from its last checkpoint on.

    Raises:
      FloatingPointError: a loss, update or score that is not finite.
      ValueError, RuntimeError: a first stage finds nothing; says why.
    """
    config, table = setting.config, METHODS[method]
    model = adapted(method, setting)
    watch, rules = table.watch(config), table.competition(config, model)
    recipe = config.recipe(method)
    return fit(method, table.title, model, setting, recipe, watch, rules)


def adapted(method: Name, setting: Setting) -> Any:
    """The base as the method trains it; what a first stage locates is kept.

    Values of a checkpoint belong to the places that were located before it.
    """
    config, table = setting.config, METHODS[method]
    if table.stage is None:
        return table.adapt(config, setting.base)
    density = getattr(getattr(config, method), "target_density", None)  # of a mask
    name = f"located_{method}" + (f"_{density:g}" if density else "")
    path = (setting.located or setting.out) / f"{name}.npz"
    if not multihost_utils.broadcast_one_to_all(path.exists()):
        files.save(path, table.stage.locate(setting))
    return table.adapt(config, setting.base, files.load(path))
