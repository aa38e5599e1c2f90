"""Sphinx's settings for the docs site: `sphinx-build -W docs build/site`."""

import re
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
nb_execution_mode = "off"

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


def _of_page(app, document, source):
    source[0] = _to_repository(source[0])


def _of_included(app, path, parent, source):
    source[0] = _to_repository(source[0])


def setup(app):
    """Connects the hooks to Sphinx."""
    app.connect("source-read", _of_page)
    app.connect("include-read", _of_included)
