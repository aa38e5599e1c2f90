"""Runs that answer questions with a language model."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from experiments import files
from experiments.config.language import LanguageConfig
from experiments.data import fingerprint, questions
from experiments.data.questions import AnswerBuckets, Questions
from experiments.data.tokens import Examples
from experiments.pretrained import language_models
from experiments.reports import answers_report
from experiments.runs import setup
from experiments.runs.result import Result
from experiments.runs.setup import Prepared
from experiments.training import choice_scores, generated, likelihood, sharding
from experiments.training.answers import Answers
from experiments.training.choice_scores import Choices
from experiments.training.trainer import Data
from snella_jax.models.llama import Llama, Tokenizer

WINDOW = 256  # tokens of prose that are seen at once, half of them counted


@dataclasses.dataclass(frozen=True)
class Prose:
    """Text that has nothing to do with the tests, in windows.

    Attributes:
      windows: its windows.
      buckets: how they become batches.
      file: where it is from.
    """

    windows: Examples
    buckets: AnswerBuckets
    file: Path


@dataclasses.dataclass(frozen=True)
class LanguageRun(Prepared):
    """A run on questions: `Prepared` for a language model.

    Attributes:
      tokenizer: the model's.
      prose: text that perplexity is measured on; None for none.
      choices: texts of the tests' choices, where they are scored.
    """

    unit: ClassVar[str] = "questions"

    config: LanguageConfig
    task: Questions
    base: Llama
    tokenizer: Tokenizer = dataclasses.field(kw_only=True)
    prose: Prose | None = dataclasses.field(default=None, kw_only=True)
    choices: Choices | None = dataclasses.field(default=None, kw_only=True)

    @property
    def name(self) -> str:
        """Folder or file of the records."""
        return str(self.config.data)

    @property
    def model(self) -> str:
        """Name or path of the model as the config gives it."""
        return self.config.model

    @cached_property
    def inputs(self) -> fingerprint.Inputs:
        """Fingerprints of the records, the prose and the model's files."""
        read = [*language_models.files(self.config.model)]
        if self.prose is not None:
            read.append(self.prose.file)
        weights = fingerprint.of_files(read)
        return {"data": dict(self.task.fingerprint), "weights": weights}

    @property
    def objective(self) -> Answers:
        """Cross entropy, and accuracy by labels."""
        return Answers(self.task.names)

    @cached_property
    def data(self) -> Data:
        """Training records, and the validation part."""
        config, task = self.config, self.task

        def buckets(source: Any, count: int) -> AnswerBuckets:
            pad, batch = self.tokenizer.pad, config.test_batch
            return AnswerBuckets.fitting(source, count, pad, batch)

        train, tested = buckets(task.train, config.buckets), buckets(task.test, 3)
        followed = buckets(task.validation, 1)
        longest = max(tested.lengths[-1], followed.lengths[-1])
        tested = dataclasses.replace(
            tested,
            lengths=(*tested.lengths[:-1], longest),
            learnt=max(tested.learnt, followed.learnt),
        )
        return Data(task.train, task.validation, train, tested)

    def stepless(self, method: str) -> Result:
        """Measures the untuned model."""
        return self.as_it_is(method)

    def besides(self, method: str, model: Any) -> dict[str, Any]:
        """Returns the scores that were asked for, and the perplexity of prose."""
        found: dict[str, Any] = {}
        if "generated" in self.config.scores:
            batch, task = self.config.test_batch, self.task
            write = generated.writer(model, self.tokenizer, batch, self.console)
            template = self.config.reading().template
            own = task.test.asked, task.names, template, write
            found |= generated.measured(*own)
        if self.choices is not None:
            with self.console.status("texts of the choices"):
                found |= choice_scores.measured(model, self.choices, self.mesh)
        if self.prose is not None:
            with self.console.status("perplexity"):
                own = self.prose.windows, self.prose.buckets, self.mesh
                found["perplexity"] = likelihood.perplexity(model, *own)
        return found

    def report(self, results: Mapping[str, dict[str, Any]]) -> None:
        """Prints the accuracies, and writes them with a figure into the folder."""
        made = answers_report.made(results, self.task, self.config.model)
        self.console.print(answers_report.printed(made))
        if files.is_primary():
            answers_report.write(made, self.out)


def prepared(name: str, config: LanguageConfig, console: Console) -> LanguageRun:
    """Returns everything that a run needs; writes nothing.

    Args:
      name: of the folder among the runs, where `config.out` does not say it.

    Raises:
      ValueError, OSError, ModuleNotFoundError: something is wrong or missing; says what
        was expected and what to do.
    """
    out = setup.folder(name, config)
    mesh = sharding.make(config.mesh)
    if config.data is None:
        raise ValueError("--data is missing: expected a file or folder of records.")
    tokenizer = language_models.tokenizer(config.model)
    with console.status("reading the records"):
        task = questions.load(config.data, tokenizer, config.reading())
        choices = None
        if "text" in config.scores:
            choices = Choices.of(
                task.test, task.names, tokenizer, tokenizer.pad, config.test_batch
            )
    for note in task.notes:
        console.print(note, style="yellow", soft_wrap=True)
    setup.check_batch(config, task, mesh, LanguageRun.unit)
    with console.status("loading the model"):
        base = language_models.load(
            config.model,
            config.dtype,
            config.param_dtype,
            remat=config.remat,
            memory=config.memory,
            activation=config.activation,
        )
    setup.check_methods(config, base)
    if "generated" in config.scores:
        asked, template = task.test.asked, config.reading().template
        generated.check(asked, template, tokenizer, base.config.context)
    return LanguageRun(
        config,
        task,
        base,
        mesh,
        console,
        out,
        tokenizer=tokenizer,
        prose=None if config.prose is None else _prose(config, tokenizer),
        choices=choices,
    )


def _prose(config: LanguageConfig, tokenizer: Tokenizer) -> Prose:
    """Returns the start of a text file, in windows."""
    file = config.prose
    assert file is not None
    # A token has a letter at least; those behind its last whole word do not matter.
    text = file.read_text("utf-8", errors="replace")
    ids = tokenizer.encode(text)[: config.prose_tokens]
    if len(ids) < 2:
        raise ValueError(f"--prose {file}: expected a text of two tokens or more.")
    windows = likelihood.windows(ids, WINDOW, WINDOW // 2)
    buckets = AnswerBuckets.fitting(windows, 1, tokenizer.pad, config.test_batch)
    return Prose(windows, buckets, file)
