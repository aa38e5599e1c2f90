"""Stable Diffusion 3 as runs name it, or the toy in its place."""

from pathlib import Path
from typing import Literal, Protocol

import jax.numpy as jnp

from experiments.paths import at_home
from experiments.pretrained import base_models, toy_sd3
from snella_jax.models import sd3
from snella_jax.models.sd3 import Pipeline
from snella_jax.models.sd3.vae import VAE

FOLDER = "stable-diffusion-3-medium-diffusers"
HUB = "https://huggingface.co/stabilityai"
FILES = (
    f"the folder of {HUB}/{FOLDER} (transformer/, vae/, scheduler/, text_encoder/, "
    "text_encoder_2/, tokenizer/ and, with T5, text_encoder_3/ and tokenizer_3/), or "
    f"of {HUB}/stable-diffusion-3-medium sd3_medium_incl_clips.safetensors (with "
    "--no_t5) or sd3_medium_incl_clips_t5xxlfp16.safetensors (with --t5_tokenizer)"
)
TERMS = "Both are gated: log in there and agree to Stability AI's licence"
OF_TOY = {  # options that it has no others for
    "dtype": "float32",
    "param_dtype": "float32",
    "remat": "none",
    "memory": "usual",
    "activation": "gelu",
    "encode_on": "device",
}


class Choice(Protocol):
    """A model as a run's config names it."""

    @property
    def model(self) -> str: ...
    @property
    def token(self) -> str: ...
    @property
    def t5(self) -> bool: ...
    @property
    def t5_length(self) -> int: ...
    @property
    def t5_tokenizer(self) -> Path | None: ...
    @property
    def encode_on(self) -> Literal["device", "host"]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def param_dtype(self) -> str: ...
    @property
    def remat(self) -> Literal["none", "blocks"]: ...
    @property
    def memory(self) -> str: ...
    @property
    def activation(self) -> str: ...


def path(name: str) -> Path:
    """Returns the folder or file of Stable Diffusion 3's weights.

    Raises:
      FileNotFoundError: there is nothing; names the files and where they come from.
    """
    found = at_home(name)
    if not found.exists():
        raise FileNotFoundError(
            f"--model {name}: there is nothing of that name. Expected {FILES}. "
            f"{TERMS}. (--config toy needs no download.)"
        )
    return found


def load(config: Choice) -> Pipeline:
    """Loads all components.

    Raises:
      FileNotFoundError, ModuleNotFoundError, ValueError: as `path` and `sd3.load`, or
        the weights are not finite.
    """
    if config.model == toy_sd3.NAME:
        if any(getattr(config, name) != value for name, value in OF_TOY.items()):
            only = ", ".join(f"--{name} {value}" for name, value in OF_TOY.items())
            raise ValueError(f"--model toy: expected {only}.")
        return toy_sd3.load(config.token)
    made = sd3.load(
        path(config.model),
        t5=config.t5,
        t5_length=config.t5_length,
        t5_tokenizer=config.t5_tokenizer,
        text_on=config.encode_on,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        remat=config.remat,
        memory=config.memory,
        activation=config.activation,
    )
    base_models.check_finite(made.transformer, config.model)
    return made


def vae(config: Choice) -> VAE | None:
    """Loads the autoencoder alone; None for the toy. Raises as `load`."""
    if config.model == toy_sd3.NAME:
        return None
    where = path(config.model)
    return sd3.vae.load(where / "vae" if where.is_dir() else where)


def files(config: Choice) -> list[Path]:
    """Returns the files of weights that `load` reads; raises as `path`."""
    if config.model == toy_sd3.NAME:
        return [toy_sd3.WEIGHTS]
    where = path(config.model)
    places = [where]
    if where.is_dir():
        places = sorted(
            folder
            for folder in where.iterdir()
            if folder.is_dir() and (config.t5 or not folder.name.endswith("_3"))
        )
    if config.t5 and config.t5_tokenizer is not None:
        places.append(config.t5_tokenizer)
    return [
        file
        for place in places
        for file in base_models.files_at(place, ".txt", ".model")  # of tokenizers
    ]
