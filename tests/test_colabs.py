"""The notebooks: generated from their `.py`, clean, and with a first cell that works.

That they run is the test of the docs site, which executes them.
"""

import importlib
import importlib.util
import json
import re
import sys
import tomllib
from importlib.machinery import PathFinder

import jax
import matplotlib
import pytest
import rich.console
from places import RESULTS, ROOT

from experiments import plotting, terminal

COLABS = ROOT / "colabs"
NAMES = sorted(path.stem for path in COLABS.glob("*.py") if path.stem != "generate")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
SMALL_MODELS = {"quickstart", "inside_snella"}  # at their full size, too
SECRET = re.compile(r"\b(hf_|ghp_|gho_|github_pat_|sk-|AKIA|AIza|ya29\.)\w{8}")
ABSOLUTE = re.compile(r"""["'\s(=](/(?:home|root|tmp|usr|mnt|work|Users)/)""")


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", COLABS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loaded(name: str) -> dict:
    return json.loads((COLABS / f"{name}.ipynb").read_text("utf-8"))


def cells(name: str, kind: str) -> list[str]:
    notebook = loaded(name)["cells"]
    return ["".join(c["source"]) for c in notebook if c["cell_type"] == kind]


def install_cell(name: str = "quickstart") -> str:
    """The first code cell, as the `.py` has it: its magics are comments."""
    text = (COLABS / f"{name}.py").read_text("utf-8")
    return re.search(r"^# %% extras=.*?(?=^# %%)", text, re.M | re.S)[0]


def test_what_is_committed_is_what_is_generated(generate):
    files = generate.generated()
    assert len(files) == 2 * len(NAMES) + 3 and not generate.stale(files)


def test_the_readme_has_a_badge_of_every_notebook(generate):
    readme = (ROOT / "README.md").read_text("utf-8")
    badges = re.findall(r"\[!\[Open in Colab\].*?\.ipynb\)", readme)
    assert sorted(badges) == [generate.badge(name) for name in NAMES]


def test_a_file_that_differs_or_is_left_over_is_found(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    path = tmp_path / "one.ipynb"
    assert generate.stale({path: "made"}) == ["one.ipynb"]
    path.write_text("edited", "utf-8")
    (tmp_path / "left.ipynb").write_text("", "utf-8")
    assert generate.stale({path: "made"}) == ["one.ipynb", "left.ipynb"]


@pytest.mark.parametrize("lost", ["[![Open in Colab]", "## Install", "extras="])
def test_a_notebook_without_its_generated_parts_is_refused(generate, lost):
    text = (COLABS / "quickstart.py").read_text("utf-8").replace(lost, "")
    with pytest.raises(ValueError, match=r"quickstart\.py: expected one"):
        generate.script("quickstart", text)


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_clean(name):
    notebook = loaded(name)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    text = json.dumps(notebook)
    assert not SECRET.search(text) and not ABSOLUTE.search(text)


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_ask_colab_for_a_tpu(name):
    metadata = loaded(name)["metadata"]
    assert metadata["accelerator"] == "TPU"
    assert metadata["colab"] == {"gpuType": "V5E1", "provenance": []}
    assert metadata["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_begins_with_what_a_reader_asks(name):
    first, *rest = cells(name, "markdown")
    assert re.match(r"# \w", first) and rest[0].startswith("## Install")
    (path,) = re.findall(r"Open in Colab.*?/blob/main/([^)]+)\)", first)
    assert (ROOT / path).is_file() and path == f"colabs/{name}.ipynb"
    owner_and_name = REPOSITORY.removeprefix("https://github.com/")
    assert f"https://colab.research.google.com/github/{owner_and_name}/blob" in first
    for word in ("TPU", "CPU", "minute", "memory"):
        assert word in first, f"{name}: its first cell says nothing of {word}"
    assert 'os.environ.get("SNELLA_COLAB") == "small"' in "".join(cells(name, "code"))


@pytest.mark.parametrize("name", NAMES)
def test_links_of_notebooks_lead_to_files(name):
    text = "\n".join(cells(name, "markdown"))
    paths = re.findall(rf"{REPOSITORY}/(?:blob|tree)/main/([^)#\s]+)", text)
    assert not [path for path in paths if not (ROOT / path).exists()]
    relative = re.findall(r"\]\((?!https://|#)([^)]+)\)", text)
    assert not relative, "Colab knows no other files"


@pytest.mark.parametrize("name", NAMES)
def test_there_are_pictures_and_they_have_texts(name):
    drawn = re.compile(r"^(?:plt\.show|Picture|show_images)\(", re.M)
    pictures = [c for c in loaded(name)["cells"] if drawn.search("".join(c["source"]))]
    assert pictures
    for cell in pictures:
        assert cell["metadata"]["mystnb"]["image"]["alt"]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_compiled_for_a_v5e_fits_it(name):
    first = cells(name, "markdown")[0]
    compiled = re.findall(r"/memory/(v5e_\w+)/memory\.json", first)
    assert compiled or name in SMALL_MODELS
    for case in compiled:
        text = (RESULTS / "memory" / case / "memory.json").read_text("utf-8")
        rows = json.loads(text)
        needed = [row["total_bytes"] for row in rows if row["method"] == "snella"]
        assert needed and max(needed) < 14 * 2**30  # of 16


@pytest.mark.parametrize("name", NAMES)
def test_the_first_cell_asks_for_what_pyproject_does(name):
    cell = cells(name, "code")[0]
    for requirement in PROJECT["dependencies"]:
        assert f'"{requirement}"' in cell
    (extras,) = re.findall(r'filter\(None, \["([\w,]*)", chip\]', cell)
    wanted = {*filter(None, extras.split(",")), "tpu", "cuda"}
    assert wanted <= PROJECT["optional-dependencies"].keys()
    assert f"git clone -q --depth 1 {REPOSITORY} snella" in cell
    assert cell.index("%pip install") < cell.index("import jax")


def test_an_address_follows_owner_and_name_of_the_repository(generate):
    text = (COLABS / "quickstart.py").read_text("utf-8")
    other = text.replace(REPOSITORY, "https://github.com/some-one/another.name")
    assert other != text and generate.script("quickstart", other) == text


def run_as_on_colab(monkeypatch, tmp_path, **environment):
    monkeypatch.setitem(sys.modules, "google.colab", object())
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    if not (tmp_path / "libtpu").exists():
        monkeypatch.setitem(sys.modules, "libtpu", None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    space = {}
    exec(install_cell(), space)
    return space


def test_the_first_cell_installs_no_extra_for_a_cpu(monkeypatch, tmp_path, capsys):
    space = run_as_on_colab(monkeypatch, tmp_path)
    assert space["chip"] is None and space["target"] == "snella"
    assert sys.path[0] == str(tmp_path / "snella")
    assert f"jax {jax.__version__} on [CpuDevice" in capsys.readouterr().out


def test_the_first_cell_stops_where_a_tpu_runtime_has_no_tpu(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="no accelerator on this tpu runtime") as stop:
        run_as_on_colab(monkeypatch, tmp_path, COLAB_TPU_1VM="1")
    assert "\n" not in str(stop.value)


def test_the_first_cell_knows_a_tpu_runtime_by_its_libtpu(monkeypatch, tmp_path):
    (tmp_path / "libtpu").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="no accelerator on this tpu runtime"):
        run_as_on_colab(monkeypatch, tmp_path)


def test_the_first_cell_stops_where_a_tpu_does_not_start(monkeypatch, tmp_path):
    def fails():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(jax, "default_backend", fails)
    with pytest.raises(SystemExit, match="no accelerator on this tpu runtime"):
        run_as_on_colab(monkeypatch, tmp_path, TPU_ACCELERATOR_TYPE="v5e-1")


def test_the_first_cell_finds_the_experiments_of_a_clone(monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(ROOT))])
    monkeypatch.chdir(COLABS)  # where Jupyter starts a notebook
    assert not PathFinder.find_spec("experiments", sys.path)
    exec(install_cell(), {})
    assert PathFinder.find_spec("experiments", sys.path).origin == str(
        ROOT / "experiments/__init__.py"
    )


def test_the_first_cell_stops_where_a_gpu_runtime_has_no_gpu(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("", "utf-8")
    (tmp_path / "nvidia-smi").chmod(0o755)
    with pytest.raises(SystemExit, match="no accelerator on this cuda runtime"):
        run_as_on_colab(monkeypatch, tmp_path)


def test_the_first_cell_stops_where_an_older_jax_was_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "__version__", "0.7.2")
    with pytest.raises(SystemExit, match=r"jax 0.7.2 was loaded .* Restart session"):
        run_as_on_colab(monkeypatch, tmp_path)


def test_the_first_cell_stops_where_jax_is_too_old(monkeypatch, tmp_path):
    old = install_cell().replace('"jax>=0.10"', '"jax>=99"')
    with pytest.raises(AssertionError, match="is not jax>=99"):
        exec(old, {})


def test_commands_leave_a_notebooks_figures_to_it(monkeypatch):
    chosen = []
    monkeypatch.setattr(matplotlib, "use", chosen.append)
    importlib.reload(plotting)
    assert chosen == ["Agg"]
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    importlib.reload(plotting)
    assert chosen == ["Agg"]


def test_commands_print_lines_in_notebooks(monkeypatch):
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert terminal.console().is_terminal and not terminal.console().is_jupyter
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert not terminal.console().is_terminal and not terminal.console().is_jupyter
