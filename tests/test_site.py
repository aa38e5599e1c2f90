"""The docs site: the API reference has every public name, the contents every page."""

import importlib
import re

import pytest
from places import ROOT

import snella_jax as snella
from snella_jax import kernels

DIRECTIVE = re.compile(r"^\.\. auto(?:function|class|exception):: (\S+)$", re.M)
REFERENCE = {
    name
    for page in (ROOT / "docs/api").glob("*.md")
    for name in DIRECTIVE.findall(page.read_text("utf-8"))
}
MODULES = (
    *("snella_jax", "snella_jax.linen", "snella_jax.pytree", "snella_jax.models"),
    *(f"snella_jax.models.{name}" for name in ("vit", "swin", "convnext")),
    *(f"snella_jax.models.{name}" for name in ("sam", "llama", "sd3")),
)
# Constants, types for annotations, and modules, which have no entry of their own.
UNLISTED = {"FAMILY", "PRESETS", "IMAGE_PRESETS", "ImageModel", "Model", "__version__"}
UNLISTED |= {"kernels", "clip", "flow", "mmdit", "t5", "vae"}


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module):
    names = set(importlib.import_module(module).__all__) - UNLISTED
    assert names and {f"{module}.{name}" for name in names} <= REFERENCE


def test_every_kernel_is_in_the_reference():
    assert {f"snella_jax.kernels.{name}" for name in kernels.KERNELS} <= REFERENCE


def test_the_reference_names_nothing_else():
    for name in REFERENCE:
        module, _, own = name.rpartition(".")
        assert hasattr(importlib.import_module(module), own), name
    assert snella.Tuning


def test_every_page_is_in_the_contents():
    home = (ROOT / "docs/index.md").read_text("utf-8")
    contents = {
        line
        for block in re.findall(r"```\{toctree\}\n(.*?)```", home, re.S)
        for line in block.splitlines()
        if line and not line.startswith(":")
    }
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    notebooks = {f"colabs/{path.stem}" for path in (ROOT / "colabs").glob("*.ipynb")}
    assert contents == pages | notebooks | {"api/index"}
