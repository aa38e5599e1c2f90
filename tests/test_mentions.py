"""Files, modules, names and commands that pages, comments and strings mention exist."""

import importlib
import re
import subprocess

import pytest
from places import ROOT

import snella_jax

FOLDERS = ("docs", "experiments", "snella_jax", "tests")
NO_MODULES = {"snella_jax.kept"}  # mark of arrays for checkpoint policies
MADE = {  # by tests, .ci/run and the docs site
    *("dash.md", "notes.md", "report/report.md", "weights/pets/README.md"),
    *("example.py", "my_steps.py", "program.py", "docs/colabs"),
}
FILE = re.compile(r"(?<![\w/.$-])((?:[\w.-]+/)*[\w-]+\.(?:md|py|toml|textproto))\b")
# Neither cut short nor the start of several names in the shell's braces.
FOLDER = re.compile(
    rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})(?:/[\w.*-]*[\w*])+)(?![\w*{{])"
)
DOTTED = re.compile(r"(?<![\w/.-])((?:experiments|snella_jax)(?:\.\w+)+)")
IMPORTED = re.compile(
    r"^ *from ((?:experiments|snella_jax)[\w.]*) import ([\w, ]+)$", re.M
)
STARTED = re.compile(r"python -m\s+(experiments[\w.]*)")
PUBLIC = re.compile(r"(?<![\w./-])snella\.(\w+)")
TEST = re.compile(r"(tests/[\w/]+\.py::test_\w+)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
DOCUMENTED = re.compile(r"documented (\w+\.md) '(.+?)'")


def texts() -> dict[str, str]:
    """Every text of ours by its path; of the changelog, the newest entry."""
    paths = [ROOT / "pyproject.toml", ROOT / ".ci/run", *ROOT.glob("*.md")]
    paths += (ROOT / "colabs").glob("*.py")
    for folder in FOLDERS:
        paths += (ROOT / folder).rglob("*.md")
        paths += (ROOT / folder).rglob("*.py")
    paths.remove(ROOT / "tests/test_mentions.py")
    found = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in paths}
    found["CHANGELOG.md"] = "\n## [".join(found["CHANGELOG.md"].split("\n## [")[:2])
    return found


TEXTS = texts()


def missing(pattern: re.Pattern, exists, only: str = "") -> set[tuple[str, str]]:
    """Page and mention of all that `pattern` finds and that does not exist."""
    return {
        (page, said)
        for page, text in TEXTS.items()
        if page.endswith(only)
        for said in set(pattern.findall(text))
        if not exists(said)
    }


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def is_name(dotted: str) -> bool:
    """Returns True if `dotted` is a module, or an attribute of one."""
    module, _, attribute = dotted.rpartition(".")
    if is_module(dotted) or not module:
        return is_module(dotted)
    if is_module(module):
        return hasattr(importlib.import_module(module), attribute)
    kind, _, of = module.rpartition(".")
    return is_name(module) and hasattr(
        getattr(importlib.import_module(kind), of), attribute
    )


def test_files():
    known = [f"/{page}" for page in TEXTS] + ["/experiments/benchmarks/h100.textproto"]
    known += ["/tests/test_mentions.py", "/timm/models/_hub.py"]

    def exists(path):
        path = re.sub(r"^(\.\./)+", "", path)
        return path in MADE or any(page.endswith(f"/{path}") for page in known)

    assert not missing(FILE, exists)


def test_folders():
    assert not missing(FOLDER, lambda path: path in MADE or any(ROOT.glob(path)))


def test_modules_and_their_names():
    assert not missing(DOTTED, lambda name: name in NO_MODULES or is_name(name))
    assert not missing(STARTED, is_module)
    imported = {
        f"{module}.{name.split()[0]}"
        for text in TEXTS.values()  # programs in strings as well
        for module, names in IMPORTED.findall(text)
        for name in names.split(",")
    }
    assert not {name for name in imported if not is_name(name)}


def test_public_names():
    assert not missing(PUBLIC, lambda name: hasattr(snella_jax, name), only=".md")


def is_test(name: str) -> bool:
    path, _, function = name.partition("::")
    return f"\ndef {function}(" in TEXTS.get(path, "")


def test_tests():
    assert not missing(TEST, is_test, only=".md")


def is_link(page: str, link: str) -> bool:
    """Returns True if a page's link leads to a file and, if it says so, a heading."""
    path, _, anchor = link.partition("#")
    target = ROOT / page if not path else (ROOT / page).parent / path
    if not anchor:
        return target.exists()
    headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.M)
    return anchor in {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


def test_links():
    dead = {
        (page, link)
        for page, text in TEXTS.items()
        for link in LINK.findall(text)
        if page.endswith(".md") and not link.startswith("https://")
        if not is_link(page, link)
    }
    assert not dead


@pytest.mark.parametrize(("page", "text"), DOCUMENTED.findall(TEXTS[".ci/run"]))
def test_a_command_of_ci_is_documented(page, text):
    subprocess.run([ROOT / ".ci/documented", page, text], check=True)


@pytest.mark.parametrize("text", ["no such command", "pip install"])
def test_ci_stops_where_a_command_is_not_documented_once(text):
    run = TEXTS[".ci/run"]
    function = run[run.index("run_documented()") : run.index("program()")]
    script = (
        f"set -euo pipefail\n{function}\nrun_documented README.md '{text}'\necho on"
    )
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode and not done.stdout
    assert f'commands with "{text}"' in done.stderr
