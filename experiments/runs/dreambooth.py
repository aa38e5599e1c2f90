"""Runs that teach a diffusion model to draw a concept from a few photographs."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import PIL
from rich.console import Console

import snella_jax as snella
from experiments.config.dreambooth import DreamboothConfig
from experiments.data import fingerprint
from experiments.data.look import say
from experiments.data.photographs import Photographs, Repeated
from experiments.data.source import Source
from experiments.methods import registry
from experiments.methods.snella import Snella
from experiments.paths import at_home
from experiments.pretrained import picture_judges, sd3_models
from experiments.reports import dreambooth_report, dreambooth_sheet
from experiments.runs import setup
from experiments.runs.result import Result, absent
from experiments.runs.setup import Prepared
from experiments.tasks import dreambooth
from experiments.tasks.dreambooth import Concept
from experiments.training import evaluation, judges, latents, pictures, sharding
from experiments.training.flow_matching import LOSS, FlowMatching
from experiments.training.judges import Judges
from experiments.training.latents import Class, Latents, Moments, WithText
from experiments.training.pictures import Drawing, Encoded
from experiments.training.trainer import Data
from snella_jax.models.sd3 import Pipeline
from snella_jax.models.sd3.mmdit import MMDiT


@dataclasses.dataclass(frozen=True)
class Learning:
    """Splits of a concept: all photographs are learnt, and pictures are the test.

    Attributes:
      concept: what is learnt.
      train: its photographs, so often that whole batches lose none.
    """

    concept: Concept
    train: Source

    @property
    def name(self) -> str:
        """Name of the concept."""
        return self.concept.name

    @property
    def validation(self) -> Source:
        """Nothing: a few photographs have no part to choose by."""
        return ()

    @property
    def test(self) -> Photographs:
        """The photographs, once."""
        return self.concept.photographs

    @property
    def full(self) -> Source:
        """Photographs that the final run trains on."""
        return self.train


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Encoded prompts of a run; the text encoders are not needed any more.

    Attributes:
      trained: of the photographs.
      of_class: of pictures of the class, for prior preservation.
      asked: the 25, of which pictures are drawn.
      bare: the same without the token, which pictures are measured against.
      empty: the prompt that pictures are led away from.
    """

    trained: Encoded
    of_class: Encoded
    asked: Encoded
    bare: tuple[str, ...]
    empty: Encoded

    @classmethod
    def of(cls, pipeline: Pipeline, concept: Concept, token: str) -> Self:
        """Encodes the prompts of a concept."""
        name = concept.class_name
        own = name, concept.live
        return cls(
            trained=Encoded.of(pipeline, [f"a photo of {token} {name}"]),
            of_class=Encoded.of(pipeline, [f"a photo of {name}"]),
            asked=Encoded.of(pipeline, dreambooth.prompts(token, *own)),
            bare=dreambooth.prompts("", *own),
            empty=Encoded.of(pipeline, [""]),
        )


@dataclasses.dataclass(frozen=True)
class DreamboothRun(Prepared):
    """A run on a concept: `Prepared` for a diffusion model.

    Attributes:
      prompts: encoded prompts.
      moments: of the photographs' latents.
      judges: measure pictures.
      codec: scale and shift of latents, and the shift of the noise levels.
    """

    unit: ClassVar[str] = "photographs"

    config: DreamboothConfig
    task: Learning
    base: MMDiT
    prompts: Prompts = dataclasses.field(kw_only=True)
    moments: Moments = dataclasses.field(kw_only=True)
    judges: Judges = dataclasses.field(kw_only=True)
    codec: Mapping[str, float] = dataclasses.field(kw_only=True)

    @property
    def name(self) -> str:
        """Subject as the config gives it."""
        return self.config.subject

    @property
    def model(self) -> str:
        """Name or path of the model as the config gives it."""
        return self.config.model

    @property
    def published(self) -> Path | None:
        """Folder of diffusers with the transformer; None if it is in a single file."""
        folder = at_home(self.model) / "transformer"
        return folder if folder.is_dir() else None

    @cached_property
    def inputs(self) -> fingerprint.Inputs:
        """Fingerprints of the photographs and of all weights."""
        weights = {}
        for file in (
            *sd3_models.files(self.config),
            *picture_judges.files(self.config),
        ):
            (found,) = fingerprint.of_files([file]).values()
            weights[f"{file.parent.name}/{file.name}"] = found
        return {
            "data": {"train": self.task.concept.photographs.fingerprint},
            "weights": weights,
            "pillow": PIL.__version__,
        }

    @property
    def objective(self) -> FlowMatching:
        """Flow matching, followed by what the judges measure of pictures."""
        return FlowMatching(
            **self.codec,
            precondition=self.config.precondition,
            prior_weight=self.config.prior,
            metrics=(*judges.metrics(self.judges), LOSS),
        )

    @cached_property
    def latents(self) -> Latents:
        """Photographs with the moments of their latents."""
        return Latents(self.task.concept.photographs, self.moments)

    @cached_property
    def data(self) -> Data:
        """Photographs to train on, each as often as any other."""
        text = self.prompts.trained.first
        return Data(
            Repeated.filling(self.latents, self.config.batch),
            None,
            WithText(text, self._prior()),
            WithText(text),
        )

    def _prior(self) -> Class | None:
        """Returns pictures of the class, which the base draws before anything trains.

        They are kept in `class_pictures/` of the run folder.
        """
        if not self.config.prior:
            return None
        count = self.config.class_pictures
        folder, texts = self.out / "class_pictures", self.prompts.of_class
        how = dataclasses.replace(self.config.drawing, each=count)
        pipeline = self._pipeline(self.base)
        self._draw(folder, pipeline, texts, how, "drawing the class")
        (drawn,) = pictures.read(folder, 1, count)
        return Class(latents.moments(pipeline.vae, drawn), texts.first)

    def stepless(self, method: str) -> Result:
        """Measures what the base draws, which does not know the token."""
        found = absent(self.objective)
        found |= {f"test_{n}": v for n, v in self.tested(method, self.base).items()}
        return Result(found, trainable=0, seconds_per_step=None, weights_moved=0)

    def tested(self, method: str, model: Any) -> dict[str, float]:
        """Draws all pictures of a method's merged model, and measures them."""
        config, concept = self.config, self.task.concept
        folder, title = self.out / "pictures" / method, registry.title(method)
        how, texts = config.drawing, self.prompts.asked
        self._draw(folder, self._pipeline(model), texts, how, f"{title}, drawing")
        drawn = pictures.read(folder, len(texts.prompts), how.each)
        with self.console.status("measuring pictures"):
            own = drawn, self.prompts.bare, concept.photographs.centres
            found = judges.measured(self.judges, *own)
        where = self.latents, self.data.transform, self.mesh, self.objective
        return found | evaluation.evaluate(model, *where).metrics

    def besides(self, method: str, model: Any) -> dict[str, Any]:
        """Keeps which weights SNELLA has moved, and how, in a file of differences."""
        if not isinstance(self.config.method(method), Snella):
            return {}
        place = Path("deltas") / f"{method}.safetensors"
        snella.save_delta(self.out / place, self.base, model)
        return {"delta": place.as_posix()}

    def block_of(self, name: str) -> tuple[int, ...] | None:
        """Returns the block of a matrix; the last block is not in the stack."""
        if name.startswith("last/"):
            return (self.base.config.depth - 1,)
        return super().block_of(name)

    def report(self, results: Mapping[str, dict[str, Any]]) -> None:
        """Prints the measures, and writes them and the sheet of pictures."""
        concept, config = self.task.concept, self.config
        metrics = self.objective.metrics
        made = dreambooth_report.made(results, metrics, concept, config.model)
        self.console.print(dreambooth_report.printed(made))
        dreambooth_report.write(made, self.out)
        dreambooth_sheet.draw(
            self.out,
            concept,
            self.prompts.asked.prompts,
            list(results),
            config.pictures,
        )

    def _pipeline(self, model: MMDiT) -> Pipeline:
        mesh = self.mesh if self.mesh.size > 1 else None
        vae, shift = sd3_models.vae(self.config), self.codec["noise_shift"]
        return Pipeline(model, vae, None, shift=shift, mesh=mesh)

    def _draw(
        self, folder: Path, pipeline: Pipeline, texts: Encoded, how: Drawing, title: str
    ) -> None:
        empty = self.prompts.empty
        pictures.draw(folder, pipeline, texts, empty, how, self.console, title)


def prepared(name: str, config: DreamboothConfig, console: Console) -> DreamboothRun:
    """Returns everything that a run needs; writes nothing.

    Of the model's components only the transformer stays in memory; the autoencoder
    comes back when pictures are drawn.

    Args:
      name: of the folder among the runs, where `config.out` does not say it.

    Raises:
      ValueError, OSError, ModuleNotFoundError: something is wrong or missing; says what
        was expected and what to do.
    """
    out = setup.folder(name, config)
    mesh = sharding.make(config.mesh)
    concept = _concept(config, console)
    task = Learning(concept, Repeated.filling(concept.photographs, config.batch))
    setup.check_batch(config, task, mesh, DreamboothRun.unit)
    if config.draw_batch % (parts := sharding.rows_of(mesh)):
        raise ValueError(
            f"draw_batch={config.draw_batch}: expected a multiple of {parts}, "
            "into which --mesh splits batches."
        )
    _require_weights(config)
    judging = picture_judges.load(config, concept.class_name)
    with console.status("loading the model"):
        pipeline = sd3_models.load(config)
    base, vae = pipeline.transformer, pipeline.vae
    _check_size(config.size, 1 if vae is None else vae.factor, base)
    setup.check_methods(config, base)
    with console.status("encoding prompts and photographs"):
        prompts = Prompts.of(pipeline, concept, config.token)
        moments = latents.moments(vae, concept.photographs.images)
    codec = {} if vae is None else {"scale": vae.scale, "shift": vae.shift}
    return DreamboothRun(
        config,
        task,
        base,
        mesh,
        console,
        out,
        prompts=prompts,
        moments=moments,
        judges=judging,
        codec={**codec, "noise_shift": pipeline.shift},
    )


def _concept(config: DreamboothConfig, console: Console) -> Concept:
    live = None if config.kind is None else config.kind == "live"
    concept = dreambooth.load(
        config.subject,
        config.data_dir,
        config.size,
        config.seed,
        config.class_name,
        live,
    )
    for note in concept.photographs.notes:
        say(console, note)
    return concept


def _require_weights(config: DreamboothConfig) -> None:
    """Raises a `FileNotFoundError` that names all weights which are missing."""
    missing = []
    for files in (sd3_models.files, picture_judges.files):
        try:
            files(config)
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:
        raise FileNotFoundError("\n".join(missing))


def _check_size(size: int, factor: int, base: MMDiT) -> None:
    """Raises a `ValueError` for pictures that the model cannot draw."""
    least = factor * base.config.patch
    most = least * base.config.positions
    if size % least or size > most:
        raise ValueError(f"size={size}: expected a multiple of {least}, up to {most}.")
