"""Writes what all notebooks have in common, and makes each `.ipynb` of its `.py`.

    python colabs/generate.py
    python colabs/generate.py --check

Every other `.py` of this folder is a notebook (jupytext's py:percent). Its badge and
its first code cell, which installs the library on Colab, are generated from
`Repository` of `[project.urls]` and `dependencies` of `pyproject.toml`, and so are the
README's badges and the other addresses of `pyproject.toml` and `CITATION.cff`: do not
edit them. `# %% extras="experiments"` above the first code cell names the extras
that the notebook needs, `# %% alt="..."` above any other the text that stands for its
picture. `--check` writes nothing, and fails if a file differs from what would be
written.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat

from snella_jax.files.atomic import whole_file

FOLDER = Path(__file__).parent
PROJECT = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text("utf-8"))[
    "project"
]
REPOSITORY = PROJECT["urls"]["Repository"]
COLAB = "https://colab.research.google.com"
# Of files of this repository, whatever it was called when the link was written.
ADDRESS = re.compile(
    r"https://github\.com/[\w.-]+/[\w.-]+(?=/(?:blob|tree)/main/| && cd )"
)
METADATA = re.compile(
    r'^((?:Changelog|Issues) = "|repository-code: ")https://github\.com/[\w.-]+/[\w.-]+',
    re.M,
)
BADGE = re.compile(r"^# \[!\[Open in Colab\].*$", re.M)
LINKED = re.compile(r"\[!\[Open in Colab\]\(\S*?\)\]\(\S*/colabs/(\w+)\.ipynb\)")
INSTALL = re.compile(
    r'^# %% \[markdown\]\n# ## Install\n.*?^# %% extras="([\w,]*)"\n.*?(?=^# %%)',
    re.M | re.S,
)
INSTALL_CELLS = """\
# %% [markdown]
# ## Install
#
# On Colab the next cell installs the library (a minute or two; pip may complain about
# other packages, which does not matter here). Anywhere else it installs nothing: open
# the notebook in a clone in which `pip install -e ".[@LOCAL@]" jupyterlab` was run.

# %% extras="@EXTRAS@"
# @title Run this first
import importlib.util
import os
import shutil
import sys
from importlib.metadata import version

from packaging.requirements import Requirement

chip = None
if "google.colab" in sys.modules:
    if os.environ.get("COLAB_TPU_1VM") or os.environ.get("TPU_ACCELERATOR_TYPE"):
        chip = "tpu"
    elif shutil.which("nvidia-smi"):
        chip = "cuda"
    elif importlib.util.find_spec("libtpu"):  # only TPU runtimes come with it
        chip = "tpu"
    extras = ",".join(filter(None, ["@EXTRAS@", chip]))
    target = f"snella[{extras}]" if extras else "snella"
    # !test -d snella || git clone -q --depth 1 @REPOSITORY@ snella
    # %pip install -q -e "{target}"
    sys.path.insert(0, os.path.abspath("snella"))
elif os.path.isdir("../experiments"):  # in a clone, which Jupyter does not look into
    sys.path.insert(0, os.path.abspath(".."))

for text in (
@PINS@
):
    pin = Requirement(text)
    imported = importlib.import_module(pin.name).__version__
    if imported != version(pin.name):
        sys.exit(
            f"{pin.name} {imported} was loaded before {version(pin.name)} was "
            "installed: choose Runtime > Restart session, and run this cell again."
        )
    assert imported in pin.specifier, f"{pin.name} {imported} is not {text}"

import jax

try:
    backend = jax.default_backend()
except RuntimeError:  # there is a chip, and it does not start
    backend = None
if chip and backend != {"tpu": "tpu", "cuda": "gpu"}[chip]:
    sys.exit(
        f"JAX sees no accelerator on this {chip} runtime: choose Runtime > Disconnect "
        "and delete runtime, and run this cell again."
    )
print(f"jax {jax.__version__} on {jax.devices()}")

"""


def badge(name: str) -> str:
    """Returns the Markdown of a notebook's badge, which opens it in Colab.

    Args:
      name: of the notebook, without its ending.
    """
    owner_and_name = REPOSITORY.removeprefix("https://github.com/")
    link = f"{COLAB}/github/{owner_and_name}/blob/main/colabs/{name}.ipynb"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})"


def install_cells(extras: str) -> str:
    """Returns the cells that install the library, as text of a `.py`.

    Args:
      extras: of `pyproject.toml`, separated by commas; may be empty.
    """
    pins = sorted(PROJECT["dependencies"])
    texts = {
        "EXTRAS": extras,
        "LOCAL": extras or "experiments",
        "REPOSITORY": REPOSITORY,
        "PINS": "\n".join(f'    "{pin}",' for pin in pins),
    }
    return re.sub("@([A-Z]+)@", lambda match: texts[match[1]], INSTALL_CELLS)


def script(name: str, text: str) -> str:
    """Returns the text of a notebook's `.py` with its generated parts.

    Args:
      name: of the notebook, without its ending.
      text: of its `.py` as it is now.

    Raises:
      ValueError: the text has no badge, or no cells that install, or several.
    """
    parts = {
        "line `# [![Open in Colab]`": BADGE,
        'cell `# ## Install`, followed by a cell `# %% extras=""`': INSTALL,
    }
    for what, pattern in parts.items():
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{name}.py: expected one {what}, as in quickstart.py.")
    text = BADGE.sub(f"# {badge(name)}", text)
    text = INSTALL.sub(lambda match: install_cells(match[1]), text)
    return ADDRESS.sub(REPOSITORY, text)


def notebook(text: str) -> str:
    """Returns the `.ipynb` of a `.py`, without outputs."""
    made = jupytext.reads(text, "py:percent")
    for number, cell in enumerate(made.cells):
        cell["id"] = f"cell-{number}"  # nbformat's own are random
        if alt := cell.metadata.pop("alt", None):
            cell.metadata["mystnb"] = {"image": {"alt": alt}}
        if cell.metadata.pop("extras", None) is not None:  # shown folded
            cell.metadata |= {"cellView": "form", "tags": ["hide-input"]}
    # With it, a page that was not executed knows magics, too.
    made.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    nbformat.validate(made)
    return jupytext.writes(made, "ipynb").rstrip("\n") + "\n"


def generated() -> dict[Path, str]:
    """Returns what the folder's files should contain, and others with an address."""
    readme = FOLDER.parent / "README.md"
    text = LINKED.sub(lambda match: badge(match[1]), readme.read_text("utf-8"))
    files = {readme: text}
    for path in (FOLDER.parent / "pyproject.toml", FOLDER.parent / "CITATION.cff"):
        text = path.read_text("utf-8")
        files[path] = METADATA.sub(lambda match: match[1] + REPOSITORY, text)
    for path in sorted(FOLDER.glob("*.py")):
        if path.name != Path(__file__).name:
            text = script(path.stem, path.read_text("utf-8"))
            files |= {path: text, path.with_suffix(".ipynb"): notebook(text)}
    return files


def stale(files: dict[Path, str]) -> list[str]:
    """Returns the names of files that differ from these, or that nothing makes."""
    differ = [
        path.name
        for path, text in files.items()
        if not path.exists() or path.read_text("utf-8") != text
    ]
    return differ + [p.name for p in FOLDER.glob("*.ipynb") if p not in files]


def main() -> None:
    """Writes the files, or compares them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, files = parser.parse_args().check, generated()
    differ = stale(files)
    if not check:
        for path, text in files.items():
            with whole_file(path) as new:
                new.write_text(text, "utf-8")
    elif differ:
        sys.exit(f"{', '.join(differ)}: run `python {Path(__file__).name}`.")


if __name__ == "__main__":
    main()
