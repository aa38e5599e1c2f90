"""Checkpoints of a run (Orbax), one at each round's end, from which it goes on.

A checkpoint appears whole or not at all. The newest stays, and the best on what is
followed. One in the midst of a round is there only if the run was told to stop.
"""

import contextlib
import logging
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from experiments import paths
from experiments.files import MismatchError, is_primary
from experiments.training.objective import Metric


class _Manager(ocp.CheckpointManager):
    """Manager whose own questions do not count as steps of `stopping.Stop`."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """Checkpoints of one method's run, written while the next round trains."""

    def __init__(self, folder: Path, metric: Metric):
        """Opens `folder`, or makes it.

        Args:
          folder: holds these checkpoints alone.
          metric: decides which is the best.
        """
        self.folder, self.metric = folder, metric

        def rank(metrics: dict[str, float]) -> float:
            return metric.rank(metrics[metric.name])

        newest = checkpoint_managers.LatestN(1)
        best = checkpoint_managers.BestN(
            get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False
        )
        keep = checkpoint_managers.AnyPreservationPolicy([newest, best])
        logging.getLogger("absl").addFilter(_is_news)
        options = ocp.CheckpointManagerOptions(
            best_fn=rank,  # without it no metric is written to disk
            preservation_policy=keep,
            cleanup_tmp_directories=True,
        )
        self._link = contextlib.ExitStack()
        place = folder.absolute()
        if paths.is_unreadable(place):
            place = self._link.enter_context(_linked(place))
        self.manager = _manager(place, options)
        self._interrupted, self._is_stale = place / "interrupted", False

    def save(
        self, passed: int, state: Any, position: dict[str, Any], value: float | None
    ) -> None:
        """Saves the state after a round.

        Args:
          passed: number of rounds so far.
          state: a pytree of arrays.
          position: that of the stream of batches.
          value: of the metric, by which the best is kept; None where it was not
            evaluated.

        Raises:
          OSError: the checkpoint before it could not be written; so do the methods
            below.
        """
        metrics = None if value is None else {self.metric.name: value}
        with self._writing():
            self.manager.save(passed, args=_both(state, position), metrics=metrics)
        self._is_stale = True

    def interrupt(self, updates: int, state: Any, position: dict[str, Any]) -> None:
        """Saves the state in the midst of a round; returns once it is written.

        Args:
          updates: number of updates so far.
          state: as `save` takes it.
          position: that of the stream; under `round` what the round needs to go on,
            with `passed`, the number of rounds before it.
        """
        with self._writing(), self._in_midst() as manager:
            manager.save(updates, args=_both(state, position))
        self._is_stale = False

    def newest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Returns rounds passed, state and position of the newest, or None.

        The position is as `interrupt` took it if a round was interrupted.

        Args:
          like: a state of the same structure, shapes, dtypes and shardings.

        Raises:
          MismatchError: it is of another state, or damaged; so does `best`.
        """
        passed = self.manager.latest_step()
        if self._interrupted.exists():
            with self._in_midst() as manager:
                updates = manager.latest_step()
                if updates is not None:
                    found = self._restored(updates, like, manager)
                    before = found["position"]["round"]["passed"]
                    if before == (passed or 0):
                        return before, found["state"], found["position"]
        if passed is None:
            return None
        found = self._restored(passed, like, self.manager)
        return passed, found["state"], found["position"]

    def best(self, like: Any) -> tuple[int, Any] | None:
        """Returns the best round and its state; None where none was evaluated."""
        with self._writing():
            self.manager.wait_until_finished()
        passed = self.manager.best_step()
        if passed is None:
            return None
        return passed, self._restored(passed, like, self.manager)["state"]

    def last(self) -> int | None:
        """Returns the round of the newest one, once everything is written."""
        with self._writing():
            self.manager.wait_until_finished()
        return self.manager.latest_step()

    def close(self) -> None:
        """Waits until everything is written."""
        with self._link, self._writing():
            self.manager.close()
            if self._is_stale and is_primary():
                shutil.rmtree(self._interrupted, ignore_errors=True)

    @contextlib.contextmanager
    def _in_midst(self) -> Iterator[_Manager]:
        """Opens the checkpoint of a round that was interrupted."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, cleanup_tmp_directories=True
        )
        with contextlib.closing(_manager(self._interrupted, options)) as manager:
            yield manager

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax's and TensorStore's are of many kinds
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise OSError(
                f"A checkpoint could not be written into {self.folder}: {reason}"
            ) from error

    def _restored(self, number: int, like: Any, manager: _Manager) -> Any:
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        what = ocp.args.Composite(
            state=ocp.args.StandardRestore(shapes), position=ocp.args.JsonRestore()
        )
        try:
            # Orbax would find another shape halfway, with other reads under way, and
            # may restore into a smaller tree as if nothing was wrong.
            _check(manager.item_metadata(number)["state"], shapes)
            return manager.restore(number, args=what)
        except Exception as error:  # Orbax's and TensorStore's are of many kinds
            reason = textwrap.shorten(str(error) or type(error).__name__, 250)
            raise MismatchError(
                f"Checkpoint {number} in {self.folder} is of another model or of other "
                f"data, or is damaged: {reason}"
            ) from error


def _manager(folder: Path, options: ocp.CheckpointManagerOptions) -> _Manager:
    handlers = {
        "state": ocp.StandardCheckpointHandler(),
        "position": ocp.JsonCheckpointHandler(),
    }
    return _Manager(folder, item_handlers=handlers, options=options)


def _both(state: Any, position: dict[str, Any]) -> ocp.args.Composite:
    return ocp.args.Composite(
        state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
    )


@contextlib.contextmanager
def _linked(folder: Path) -> Iterator[Path]:
    """Links to a folder from a path that Orbax can read."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as elsewhere:
        link = Path(elsewhere) / "checkpoints"
        link.symlink_to(folder, target_is_directory=True)
        yield link


def _check(saved: Any, wanted: Any) -> None:
    """Raises a `ValueError` if a leaf is missing, surplus or of another shape."""
    if saved is None:
        raise ValueError("it has no state")
    found, expected = (
        {
            jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
            for path, leaf in leaves
        }
        for leaves in map(jax.tree_util.tree_leaves_with_path, (saved, wanted))
    )
    for names, said in (
        (expected.keys() - found.keys(), "it lacks"),
        (found.keys() - expected.keys(), "nothing here is called as its"),
    ):
        if names:
            raise ValueError(f"{said} {', '.join(sorted(names))}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{name} is of {found[name]} and should be of {shape}")


def _is_news(record: logging.LogRecord) -> bool:
    # Rounds without an evaluation are meant, and writes may take longer than rounds.
    usual = ("did not provide metrics", "Waiting for previous save")
    return not any(text in record.getMessage() for text in usual)
