"""Makes a model of what `arrange` returned: its config, then its values."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from snella_jax.files.errors import CheckpointError
from snella_jax.models.checkpoints.mapping import fill
from snella_jax.models.checkpoints.read import Checkpoint


def configured(
    kind: Callable[..., Any],
    checkpoint: Checkpoint,
    fields: Callable[[], Mapping[str, Any]],
    problems: Sequence[str],
) -> Any:
    """Makes a config from the fields that shapes and config files say.

    Raises:
      CheckpointError: there is none; `problems`, what `arrange` found, stand below it.
    """
    try:
        return kind(**fields())
    except KeyError as missing:
        reason = f"there is no tensor for {missing.args[0]}"
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as wrong:
        reason = str(wrong).rstrip(".")
    raise CheckpointError(checkpoint.path, "\n  ".join([reason, *problems]))


def agreed(
    by_shapes: Mapping[str, Any], by_config: Mapping[str, Any]
) -> dict[str, Any]:
    """Joins the fields of a config that shapes say with those that a file says.

    >>> agreed({"width": 8}, {"width": 8, "norm_eps": 1e-6})
    {'width': 8, 'norm_eps': 1e-06}

    Raises:
      ValueError: they differ in a field.
    """
    for name in by_shapes.keys() & by_config.keys():
        if by_shapes[name] != by_config[name]:
            raise ValueError(
                f"its config says {name}={by_config[name]}, and its weights "
                f"{by_shapes[name]}"
            )
    return {**by_shapes, **by_config}


def check_known(kind: type, options: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for an option that is no field of a config."""
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}.")


def given(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config that a caller gave: all that are not None.

    >>> from snella_jax.models.vit import ViTConfig
    >>> given(ViTConfig, {"dtype": None, "remat": "blocks"})
    {'remat': 'blocks'}

    Raises:
      ValueError: the config has no such field.
    """
    check_known(kind, options)
    return {name: value for name, value in options.items() if value is not None}


def filled(
    kind: Callable[..., Any],
    config: Any,
    checkpoint: Checkpoint,
    parts: Mapping[str, np.ndarray],
    *,
    num_classes: int | None,
    width: int,
    stacked: str,
    problems: Sequence[str],
) -> Any:
    """Makes a model with these values.

    Args:
      kind: class of models; called with a config and `rngs`.
      config: its config, with the checkpoint's number of classes.
      checkpoint: for errors.
      parts: arrays by path.
      num_classes: None keeps the checkpoint's head; a number makes a new one that
        starts at 0, and 0 none.
      width: width of the features that a head sees.
      stacked: regex of the stacked blocks, see `fill`.
      problems: problems that `arrange` found.

    Raises:
      CheckpointError: as `fill`.
      ValueError: `num_classes` is negative.
    """
    origin = head_origin(parts) if num_classes is None else None
    if num_classes is not None:
        config = dataclasses.replace(config, num_classes=num_classes)
        parts = _new_head(parts, width, num_classes)
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    stacked = stacked if config.stacked else "(?!)"
    fill(checkpoint.path, parts, model, stacked=stacked, problems=problems)
    if origin:
        model.head.origin = origin
    return model


def head_origin(parts: Mapping[str, np.ndarray]) -> str | None:
    """Hashes a file's head, for a model to remember whose classes it tells.

    It stays when the head is trained, and goes with the head when that is replaced.
    """
    head = [parts[path] for path in ("head/kernel", "head/bias") if path in parts]
    if not head:
        return None
    return hashlib.sha256(b"".join(part.tobytes() for part in head)).hexdigest()


def _new_head(
    parts: Mapping[str, np.ndarray], width: int, num_classes: int
) -> dict[str, np.ndarray]:
    rest = {path: part for path, part in parts.items() if not path.startswith("head/")}
    if not num_classes:
        return rest
    kernel, bias = np.zeros((width, num_classes)), np.zeros(num_classes)
    return rest | {"head/kernel": kernel, "head/bias": bias}
