"""Runs that segment images with a SAM."""

import dataclasses
import re
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
import PIL
from rich.console import Console

from experiments import files
from experiments.config.polyp import PolypConfig
from experiments.data import fingerprint, pair_check
from experiments.data.mask_transforms import MaskTransform
from experiments.data.segmentation_task import SegmentationTask
from experiments.data.source import Joined, Source
from experiments.methods import registry
from experiments.methods.registry import BOX, DECODER
from experiments.pretrained import sam_models
from experiments.reports import masks_figures, masks_report, predicted
from experiments.reports.masks_report import TEST
from experiments.runs import setup
from experiments.runs.result import Result
from experiments.runs.setup import Prepared
from experiments.tasks import segmentation_catalogue
from experiments.training import evaluation, sharding
from experiments.training.embeddings import (
    Embedded,
    EmbeddedTransform,
    OfEmbeddings,
    embedded,
)
from experiments.training.segmentation import Segmentation
from experiments.training.session import Session
from experiments.training.trainer import Data
from experiments.training.true_boxes import TrueBoxes
from snella_jax.models.sam import Sam


@dataclasses.dataclass(frozen=True)
class PolypRun(Prepared):
    """A run on images with masks: `Prepared` for a SAM.

    Attributes:
      embeddings: folder of what the encoder makes of images, while the decoder trains
        alone; trials of a search and the run itself share it.
    """

    unit: ClassVar[str] = "images"

    config: PolypConfig
    task: SegmentationTask
    base: Sam
    embeddings: Path = dataclasses.field(kw_only=True)

    @property
    def name(self) -> str:
        """Name of the task as the config gives it."""
        return self.config.task

    @property
    def model(self) -> str:
        """Name or path of the SAM as the config gives it."""
        return self.config.model

    @cached_property
    def inputs(self) -> fingerprint.Inputs:
        """Fingerprints of the data and of the SAM's weights."""
        splits = self.task.fingerprint
        if splits is None:
            raise ValueError(f"{self.task.name} was not looked at by pair_check.")
        return {
            "data": splits,
            "weights": fingerprint.of_files(sam_models.files(self.config.model)),
            "pillow": PIL.__version__,
        }

    @cached_property
    def transform(self) -> MaskTransform:
        """Transform of all images but those that are trained on."""
        config, given = self.config, self.base.config
        return MaskTransform(
            given.image_hw[0],
            config.fit,
            mean=given.pixel_mean,
            std=given.pixel_std,
            evaluated=config.test_batch,
        )

    @property
    def augment(self) -> MaskTransform:
        """Transform of images that are trained on."""
        return dataclasses.replace(self.transform, flip=self.config.flip)

    @property
    def objective(self) -> Segmentation:
        """Cross entropy and soft IoU; Dice, IoU and the released measure."""
        return Segmentation(self.transform, self.config.pooling)

    @cached_property
    def data(self) -> Data:
        """Examples that the protocol trains on and follows."""
        task, config = self.task, self.config
        return Data(
            task.full if config.trains_on_all else task.train,
            getattr(task, self.followed) if self.followed else None,
            self.augment,
            self.transform,
        )

    @property
    def tests(self) -> dict[str, Source]:
        """All sets that are tested, by name."""
        return {TEST: self.task.test, **self.task.extra_tests}

    def session(self, method: str) -> Session:
        """Returns what a method receives of the run; the decoder's are embeddings.

        Several processes would each need all of them: there the encoder runs along.
        """
        session = super().session(method)
        if method != DECODER or jax.process_count() > 1:
            return session
        objective = OfEmbeddings(self.transform, self.config.pooling)
        return dataclasses.replace(session, objective=objective, data=self._embedded())

    def _embedded(self) -> Data:
        """Returns `data` with embeddings in the images' place."""

        def of(split: str, transform: MaskTransform) -> Embedded:
            path, source = self.embeddings / f"{split}.npy", getattr(self.task, split)
            how = self.base, source, transform, self.mesh, self.console
            return embedded(path, *how)

        # Trials follow what the run itself may train on: one file has all views of it.
        sources = {
            "train": of("train", self.augment),
            "validation": of("validation", self.augment),
        }
        if self.followed == TEST:
            sources[TEST] = of(TEST, self.transform)
        whole = Joined(sources["train"], sources["validation"])
        return Data(
            whole if self.config.trains_on_all else sources["train"],
            sources[self.followed] if self.followed else None,
            EmbeddedTransform(self.augment),
            EmbeddedTransform(self.transform),
        )

    def stepless(self, method: str) -> Result:
        """Measures the base without a prompt, or with the box around the true mask."""
        return self.as_it_is(method)

    def objective_of(self, method: str) -> Segmentation:
        """Returns the objective that a method is measured by."""
        if method == BOX:
            return TrueBoxes(self.transform, self.config.pooling)
        return self.objective

    def tested(self, method: str, model: Any) -> dict[str, float]:
        """Returns the metrics on the test split; keeps what the model predicts."""
        return self._measured(method, model, TEST)

    def besides(self, method: str, model: Any) -> dict[str, Any]:
        """Returns `tests`, the metrics on further sets by the sets' names."""
        found = {}
        for name in self.task.extra_tests:
            with self.console.status(f"testing on {name}"):
                found[name] = self._measured(method, model, name)
        return {"tests": found}

    def _measured(self, method: str, model: Any, name: str) -> dict[str, float]:
        source, objective = self.tests[name], self.objective_of(method)
        masks = {}

        def keep(index: int, output: Any) -> None:
            masks[index] = objective.found(source[index], output)

        where = source, self.transform, self.mesh, objective
        metrics = evaluation.evaluate(model, *where, look=keep).metrics
        found = any(mask.any() for mask in masks.values())
        if masks and not found and jax.process_count() == 1:  # others see other images
            self._say_empty(method, name)
        if files.is_primary():
            predicted.write(self.out, method, name, masks)
        return metrics

    def _say_empty(self, method: str, name: str) -> None:
        """Prints that a method finds nothing at all, and what may mend it."""
        mended = ""
        if method not in self.config.stepless:
            lr, flag = self.config.trainable_lr, "--trainable_lr"
            if lr is None or method == DECODER:
                lr, flag = self.config.settings[method].lr, f"--{method}.lr"
            mended = (
                ": train longer, warm up longer (--warmup_epochs), or lower the rate "
                f"of the decoder ({flag} {lr / 3:.1g})"
            )
        self.console.print(
            f"{registry.title(method)}: every mask of {name} is empty{mended}",
            style="yellow",
            soft_wrap=True,
        )

    def block_of(self, name: str) -> tuple[int, ...] | None:
        """Returns the block of a matrix; a ViT's blocks of both kinds take turns."""
        found = super().block_of(name)
        kind = re.search(r"/blocks/(windowed|whole)/", name)
        if found is None or kind is None:
            return found
        config: Any = self.base.encoder.config
        return (config.places.index((kind[1], found[-1])),)

    def report(self, results: Mapping[str, dict[str, Any]]) -> None:
        """Prints the measures of all sets, and writes them with the figures.

        Embeddings are no longer needed then.
        """
        titled = {n: (self._title(n), own) for n, own in self.tests.items()}
        sizes = {n: (title, len(own)) for n, (title, own) in titled.items()}
        how = self.objective.metrics, sizes, self.task.notes, self.config.model
        made = masks_report.made(results, *how)
        self.console.print(masks_report.printed(made))
        if files.is_primary():
            masks_report.write(made, self.out)
            masks_figures.draw(self.out, titled, list(results))
            shutil.rmtree(self.embeddings, ignore_errors=True)

    def _title(self, name: str) -> str:
        return self.task.name if name == TEST else self.task.titles.get(name, name)


def prepared(name: str, config: PolypConfig, console: Console) -> PolypRun:
    """Returns everything that a run needs; writes nothing.

    Args:
      name: of the folder among the runs, where `config.out` does not say it.

    Raises:
      ValueError, OSError, ModuleNotFoundError: something is wrong or missing; says what
        was expected and what to do.
    """
    out = setup.folder(name, config)
    mesh = sharding.make(config.mesh)
    task = _task(config)
    pair_check.require_training(task)
    setup.check_batch(config, task, mesh, PolypRun.unit)
    with console.status("loading the model"):
        base = sam_models.load(config)
    height, width = base.config.image_hw
    if height != width:
        raise ValueError(
            f"--model {config.model} takes images of {height} x {width}: expected a "
            "square, such as --image_size 256."
        )
    setup.check_methods(config, base)
    task = pair_check.checked(task, console, config.skip_corrupt)
    setup.check_batch(config, task, mesh, PolypRun.unit)
    return PolypRun(
        config, task, base, mesh, console, out, embeddings=out / "embeddings"
    )


def _task(config: PolypConfig) -> SegmentationTask:
    """Returns the task with its further tests, and as few images as the config says."""
    where = config.data_dir, config.validation, config.tests
    task = segmentation_catalogue.load(config.task, *where)
    changes: dict[str, Any] = {
        split: setup.sampled(getattr(task, split), config.limit)
        for split in ("train", "validation", "test")
    }
    tests = {n: setup.sampled(own, config.limit) for n, own in task.extra_tests.items()}
    return dataclasses.replace(task, **changes, extra_tests=tests)
