"""The docs site: the API reference has every public name, the contents every page."""

import importlib
import inspect
import re

import pytest
from places import ROOT

from snella_jax import kernels

DIRECTIVE = re.compile(
    r"^\.\. (?:auto(?:function|class|exception)|py:data):: (\S+)$", re.M
)
REFERENCE = {
    name
    for page in (ROOT / "docs/api").glob("*.md")
    for name in DIRECTIVE.findall(page.read_text("utf-8"))
}
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "snella_jax").rglob("*.py"))
    if re.search(r"^__all__ = ", path.read_text("utf-8"), re.M)
]
# Constants and types for annotations, which have no entry of their own.
UNLISTED = {"FAMILY", "PRESETS", "IMAGE_PRESETS", "ImageModel", "Model", "__version__"}
UNLISTED |= {"SHIFT", "STEPS", "Text", "Velocity"}
IMAGE = re.compile(r"!\[([^\]]*)\]\(|^```\{(?:image|figure)\}(?s:(.*?))^```", re.M)


def named(name: str):
    """Returns what a dotted name stands for."""
    module, _, own = name.rpartition(".")
    return getattr(importlib.import_module(module), own)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module):
    listed = [named(name) for name in REFERENCE]
    for name in set(importlib.import_module(module).__all__) - UNLISTED:
        public = named(f"{module}.{name}")
        if not inspect.ismodule(public):
            assert any(public is one for one in listed), name


def test_every_kernel_is_in_the_reference():
    assert {f"snella_jax.kernels.{name}" for name in kernels.KERNELS} <= REFERENCE


def test_the_reference_names_nothing_else():
    assert all(named(name) is not None for name in REFERENCE)


def test_every_picture_of_a_page_has_a_text():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    texts = [text for page in pages for text in IMAGE.findall(page.read_text("utf-8"))]
    assert len(texts) > 10
    for shown, block in texts:
        assert shown.strip() or ":alt:" in block


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
