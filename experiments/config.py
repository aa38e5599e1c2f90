"""Configs and command lines: presets, files and overrides become a `RunConfig`."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

import snella_jax as snella
from experiments.data.catalogue import DATA_DIR


@dataclasses.dataclass(frozen=True)
class Linear:
    """The linear probe."""

    strengths: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    """Inverse L2 strengths, from which the validation split chooses."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """LoRA."""

    lr: float = 1e-2
    """Peak learning rate."""
    weight_decay: float = 1e-4
    rank: int = 8


@dataclasses.dataclass(frozen=True)
class Snella:
    """SNELLA; the defaults are the paper's method."""

    lr: float = 2e-2
    """Peak learning rate."""
    weight_decay: float = 1e-4
    rank: int = 8
    kernel: Literal[
        "linear", "piecewise_linear", "rbf", "sigmoid", "normalized_rbf", "mix_k"
    ] = "mix_k"
    gate: Literal["product", "released", "soft", "hard"] = "product"
    path: Literal["merged", "parallel"] = "merged"
    initial_density: float = 1.0
    """Fraction of the adapted weights that may move in the first epoch."""
    target_density: float = 0.3
    """Fraction of the adapted weights that may move in the last epoch."""
    power: float = 3.0
    """Of the budget schedule, Eq. 12."""
    dropout: float = 0.0
    """On the adapter's input; needs path=parallel."""
    drop_path: float = 0.0
    """Of the adapter's output; needs path=parallel."""
    beta1: float = 0.85
    """Smoothing of the sensitivity, Eq. 9."""
    beta2: float = 0.85
    """Smoothing of the uncertainty, Eq. 10."""

    def adapter(self, targets: str, trainable: str) -> snella.SnellaConfig:
        """The library's config for these settings."""
        same = ("rank", "kernel", "gate", "path", "dropout", "drop_path")
        densities = ("initial_density", "target_density")
        fields = {name: getattr(self, name) for name in (*same, *densities)}
        if self.kernel == "linear":  # from 0 the gates would never let it move
            fields["kernel"] = snella.kernels.linear(zero_init=False)
        return snella.SnellaConfig(targets=targets, trainable=trainable, **fields)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run: a task, a pre-trained model, and the methods that fine-tune it."""

    task: str = "digits"
    """A name from `python -m experiments.data.show --list`, a folder or a CSV file."""
    data_dir: Path = DATA_DIR
    """Where TFDS keeps prepared sets, and archives are unpacked."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded, and count them."""
    model: str = "vit_fashion_mnist"
    """vit_fashion_mnist (the quickstart's), dinov2_saliency (the extra `demo`), or the
    path of published ViT weights."""
    image_size: int | None = None
    """Side of the images in pixels. Default: that of the weights."""
    methods: tuple[Literal["linear", "lora", "snella"], ...] = (
        "linear",
        "lora",
        "snella",
    )
    """What to train, one after the other."""
    epochs: int = 15
    """Of every method but the linear probe, which converges."""
    warmup_epochs: int = 2
    """In which the learning rate rises from 0."""
    drop_path: float = 0.0
    """Rate of stochastic depth in the last block of the model, in training."""
    batch: int = 32
    """Images in a step."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation of LoRA and SNELLA."""
    targets: str = r"blocks/.*/(query|key|value|out|fc1|fc2)"
    """Regex of the layers that are adapted."""
    trainable: str = r"head|cls_token"
    """Regex of what trains besides."""
    seed: int = 0
    """Of the factors and the order of the images; the splits stay."""
    linear: Linear = Linear()
    lora: Lora = Lora()
    snella: Snella = Snella()
    out: Path | None = None
    """Run folder, new or empty. Default: runs/NAME/DATE-TIME."""

    def check(self) -> None:
        """Raises a `ValueError` on values that would fail in the midst of a run."""
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs}: expected fewer than "
                f"epochs={self.epochs}."
            )
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: expected at least 1.")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(
                f"methods={self.methods}: expected each once, at least one."
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: expected at least 0.")
        if not self.linear.strengths or min(self.linear.strengths) <= 0:
            raise ValueError(
                f"linear.strengths={self.linear.strengths}: expected positive numbers."
            )
        for name, method in (("lora", self.lora), ("snella", self.snella)):
            if not (0 < method.lr < math.inf and 0 <= method.weight_decay < math.inf):
                raise ValueError(
                    f"{name}.lr={method.lr}, {name}.weight_decay="
                    f"{method.weight_decay}: expected lr > 0 and weight_decay >= 0."
                )
        if self.lora.rank < 1:
            raise ValueError(f"lora.rank={self.lora.rank}: expected at least 1.")
        snella.track_importance(self.snella.beta1, self.snella.beta2)
        if "snella" in self.methods:
            adapter = self.snella.adapter(self.targets, self.trainable)
            adapter.schedule(1, self.epochs, power=self.snella.power)


PRESETS: dict[str, tuple[str, RunConfig]] = {
    "quickstart": (
        "handwritten digits, a small ViT pre-trained on Fashion-MNIST, on a laptop CPU",
        RunConfig(),
    ),
    "elpv": (
        "defects of solar cells, a real ViT-S/14 (extra `demo`), at 112 x 112",
        RunConfig(
            task="elpv",
            model="dinov2_saliency",
            image_size=112,
            epochs=8,
            warmup_epochs=1,
            lora=Lora(lr=1e-3),
            snella=Snella(lr=3e-3),
        ),
    ),
}


def parse(program: str, argv: Sequence[str] | None = None) -> tuple[str, RunConfig]:
    """The config's name and the config that a command line means.

    `--config` names a preset or a JSON file with (some) fields of `RunConfig`, such as
    the `config.json` of an earlier run; other options override single fields.

    Raises:
      SystemExit: with a message that lists what is valid, when a preset, file, field or
        value is none.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(argv)
    wants_help = "--help" in rest or "-h" in rest
    if not known.config and not wants_help:
        raise SystemExit(f"{program}: --config is missing. {_choices()}")
    name = known.config or "quickstart"
    default, from_file = _base(program, name)
    config, unknown = tyro.cli(
        RunConfig,
        prog=f"{program} --config {name}",
        description=f"--config NAME or FILE. {_choices()}. Alone, --resume FOLDER goes "
        "on with an interrupted run.",
        default=default,
        args=[*from_file, *rest],
        return_unknown_args=True,
        config=(tyro.conf.FlagConversionOff,),
    )
    if unknown:
        raise SystemExit(
            f"{program}: no field is called {' '.join(unknown)}. There are: "
            + ", ".join(f"--{field}" for field in _fields(RunConfig()))
        )
    try:
        config.check()
    except ValueError as error:
        raise SystemExit(f"{program}: {error}") from error
    return Path(name).stem, config


def as_dict(config: RunConfig) -> dict[str, Any]:
    """The config as JSON can hold it; `--config` reads it back."""
    fields = dataclasses.asdict(config)
    fields.pop("out")
    return fields | {"data_dir": str(config.data_dir)}


def _base(program: str, name: str) -> tuple[RunConfig, list[str]]:
    """The preset of that name, or the defaults and the flags that a file stands for."""
    if name in PRESETS:
        return PRESETS[name][1], []
    path = Path(name)
    if not path.is_file():
        raise SystemExit(
            f"{program}: no preset or file is called {name!r}. {_choices()}"
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise SystemExit(f"{program}: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise SystemExit(f"{program}: {path} holds no JSON object of fields.")
    return RunConfig(), [word for pair in _flags(values) for word in pair]


def _flags(values: dict[str, Any], prefix: str = "") -> Iterator[list[str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flags(value, f"{prefix}{name}.")
        else:
            words = value if isinstance(value, list) else [value]
            yield [f"--{prefix}{name}", *map(str, words)]


def _fields(config: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _choices() -> str:
    return "Presets: " + "; ".join(f"{k} ({text})" for k, (text, _) in PRESETS.items())
