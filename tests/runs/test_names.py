"""Names that rich, matplotlib, Markdown, Orbax and the file system have views on."""

import contextlib
import io
import json
import os
import pathlib
import re
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pictures
import pytest
from rich.console import Console

from experiments import compare, paths, plotting, report, terminal, vtab
from experiments.config import command_line, presets, run_config
from experiments.data import check
from experiments.reports import figures
from experiments.runs import cli, images
from experiments.studies import matrix_fitting, table_store
from experiments.tasks import catalogue
from experiments.training.checkpoints import Checkpoints
from experiments.training.objective import Metric

# 250 bytes: markup, an emoji's name, formulas, a pattern, what Markdown ends a cell by.
ACCURACY = Metric("accuracy")
ODD = "[v2] $5_a$ ~ :dog: *? a|b\\c [red] é" + os.fsdecode(b"\xff")
ODD += "x" * (250 - len(os.fsencode(ODD)))
SHOWN = ODD.replace("\udcff", r"\xff")


def test_a_run_of_an_odd_name_works_from_its_data_to_its_report(
    tmp_path, monkeypatch, capsys
):
    """In --task, --model and --out, and killed before it wrote its results."""
    monkeypatch.chdir(tmp_path)
    pictures.draw(tmp_path / "t" / ODD)
    shutil.copytree(pictures.CLASSIFIER, tmp_path / "m" / ODD)
    words = ["--config=quickstart", f"--task=t/{ODD}", f"--model=m/{ODD}"]
    words += ["--image_size=24", "--mesh=data=1", "--batch=4", "--warmup_epochs=0"]
    words += [pictures.TARGETS, "--epochs=2", "--methods", "snella", "--snella.rank=2"]
    summary = vtab.main([*words, f"--out=o/{ODD}"])
    out = tmp_path / "o" / ODD
    for name in ("results.json", "summary.json"):
        (out / name).unlink()
    shutil.rmtree(out / "adapters")
    again = vtab.main([f"--resume=o/{ODD}"])["methods"]["snella"]
    assert again == summary["methods"]["snella"]
    said = capsys.readouterr().out.replace("\n", "").replace(" ", "")
    assert f"Everythingisino/{ODD}".replace(" ", "").replace("\udcff", "") in (
        said.replace(r"\udcff", "")
    )
    assert list((out / "adapters/snella").glob("*.safetensors"))
    for picture in ("curves", "allocation", "sparsity"):
        assert (out / f"figures/{picture}.png").stat().st_size > 10_000
    made = report.main([f"o/{ODD}", f"--out=r/{ODD}"])
    (task,) = made["tasks"]
    assert task == ODD and made["columns"][0]["tasks"][task]["mean"] == pytest.approx(
        100 * again["test_accuracy"]
    )
    lines = (tmp_path / "r" / ODD / "report.md").read_text("utf-8").splitlines()
    assert lines[2].startswith(f"| {SHOWN.replace('|', chr(92) + '|')} | ")


@pytest.mark.parametrize("name", [
    "a[v2]", "a[!b]*", "what?", "back\\slash", "gs:", os.fsdecode(b"\xff"), "$1", "~",
])  # fmt: skip
def test_checkpoints_are_read_wherever_they_lie(name, tmp_path):
    """And never those of a folder whose name a pattern would match, too."""
    for value, folder in enumerate((name, "a[v2]".replace("[v2]", "v"), "whatx")):
        with contextlib.closing(
            Checkpoints(tmp_path / folder / "c", ACCURACY)
        ) as saved:
            state = {"x": np.full(3, float(value))}
            saved.save(1, state, {"next_index": value}, 0.5)
            assert saved.last() == 1
    with contextlib.closing(Checkpoints(tmp_path / name / "c", ACCURACY)) as saved:
        epoch, state, position = saved.newest({"x": np.ones(3)})
        assert (epoch, position) == (1, {"next_index": 0})
        np.testing.assert_array_equal(state["x"], np.zeros(3))
        best, state = saved.best({"x": np.ones(3)})
        np.testing.assert_array_equal(state["x"], np.zeros(3))
    assert best == 1 and (tmp_path / name / "c/1/state").is_dir()


def test_what_a_font_lacks_is_drawn_without_a_word(tmp_path):
    """Emoji, and control characters that names may have."""
    rows = [{"epoch": 1, "train_loss": 1.0}]
    figures.curves(tmp_path / "curves.png", {"LoRA": rows}, "猫 \U0001f436 \t \x1b")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_no_checkpoint_lies_where_tensorstore_would_name_it_otherwise(monkeypatch):
    """Under ISO-8859-1 a folder called é is another for what opens it as UTF-8."""
    here = pathlib.Path("/runs/é")
    assert not paths.is_unreadable(here)
    monkeypatch.setattr(os, "fsencode", lambda text: str(text).encode("latin-1"))
    assert paths.is_unreadable(here) and not paths.is_unreadable(here.parent)


@pytest.mark.parametrize("text", ["$5 to $9", "a$b", r"\$ and $", "$", "$$", "%_^$x$"])
def test_text_is_drawn_as_it_is(text):
    figure = plt.figure()
    found = figure.text(0, 0, plotting.label(text))
    drawn, is_formula = found._preprocess_math(found.get_text())
    plt.close(figure)
    assert (drawn, is_formula) == (text, False)


def test_a_console_prints_text_as_it_is(monkeypatch):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", stream)
    console = terminal.console()
    console.print("[red]a[/] :dog: [/b] ü \udcff", soft_wrap=True)
    console.rule("[/x]")
    with terminal.progress(Console(file=stream, force_terminal=True)) as bar:
        bar.add_task("[/y] :dog: [v2]", total=1)
    said = raw.getvalue().decode()
    assert said.startswith(r"[red]a[/] :dog: [/b] \xfc \udcff" + "\n")
    assert " [/x] " in said and "[/y] :dog: [v2]" in said


@pytest.mark.parametrize("name", ["[b] $x$", ":dog:"])
def test_a_table_of_corrupt_images_has_their_names(name, tmp_path):
    pictures.draw(tmp_path / name)
    (tmp_path / name / "train/dark/0.png").write_bytes(b"")
    said = io.StringIO()
    console = Console(file=said, markup=False, emoji=False, width=999)
    check.checked(catalogue.load(str(tmp_path / name)), console, skip_corrupt=True)
    text = " ".join(said.getvalue().split())
    assert f"{name}, train: 1 corrupt images of 8 left out" in text


# ~


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    """Also where the shell leaves that to us, as in --out=~/run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    _, config = command_line.parse(
        "x", presets.VTAB, ["--config", "quickstart", "--out=~/run"]
    )
    assert config.out == tmp_path / "run"
    (tmp_path / "config.json").write_text(json.dumps({"epochs": 7}), "utf-8")
    assert (
        command_line.parse("x", presets.VTAB, ["--config=~/config.json"])[1].epochs == 7
    )
    assert command_line.interrupted("x", ["--resume=~"]) == (tmp_path, [])
    for path in ("~nobody-of-that-name/x", "a/~", "~" * 3):
        assert paths.at_home(path) == pathlib.Path(path)
    monkeypatch.chdir(tmp_path)
    pictures.draw(tmp_path / "~cats")  # nobody's home
    assert catalogue.load("~cats").name == "~cats"
    assert catalogue.load("~/~cats").name == "~cats"


@pytest.mark.parametrize("name", ["~", "~root", "None", "-x", "--out=y"])
def test_a_run_goes_on_in_the_folder_that_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/nowhere")
    pathlib.Path(name).mkdir()
    values = run_config.as_dict(presets.VTAB["quickstart"].config) | {"epochs": 7}
    (tmp_path / name / "config.json").write_text(json.dumps(values), "utf-8")
    found = []
    monkeypatch.setattr(images, "prepared", lambda _, config, __: config)
    monkeypatch.setattr(cli, "run", lambda config, resume: found.append(config))
    vtab.main([f"--resume=./{name}"])
    assert [(config.out, config.epochs) for config in found] == [(tmp_path / name, 7)]


# What no folder can be called


def deep():
    return "/".join(["x" * 200] * 20)


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("y" * 256, r"'yyy.*' has more than the 255 bytes that a name may have"),
        ("new/" + "é" * 128, r"'ééé.*' has more than the 255 bytes"),
        (deep(), "would have a path of more than 4096 bytes"),
        ("file", r"--out file: .*file is a file, expected a folder"),
        ("file/run", "file is a file, expected a folder"),
    ],
)
@pytest.mark.parametrize("main, words", [
    (vtab.main, ["--config=quickstart"]),
    (compare.main, []),
    (matrix_fitting.main, []),
])  # fmt: skip
def test_what_cannot_be_made_is_refused_at_once(
    main, words, out, said, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("file").write_bytes(b"mine")
    with pytest.raises(SystemExit, match=said):
        main([*words, f"--out={out}"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write all
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} cannot be written to")):
        paths.check_out(tmp_path / "run")


def test_the_longest_path_in_a_run_folder_is_as_long_as_allowed_for(tmp_path):
    """Below a folder that is taken, everything has its place."""
    limit = os.pathconf(tmp_path, "PC_PATH_MAX") - paths.DEEPEST
    whole = len(os.fsencode(tmp_path))
    folder = tmp_path
    while limit - whole > 0:
        folder = folder / ("x" * min(200, limit - whole - 1))
        whole = len(os.fsencode(folder))
        if limit - whole == 1:
            break
    paths.check_out(folder)
    trial = folder / "search/snella_released/100/checkpoints/snella_released"
    with contextlib.closing(Checkpoints(trial, ACCURACY)) as saved:
        saved.save(1000, {"x": np.ones(3)}, {"next_index": 1}, 0.5)
    with contextlib.closing(Checkpoints(trial, ACCURACY)) as saved:
        assert saved.newest({"x": np.zeros(3)})[0] == 1000


def test_a_cell_of_a_long_name_has_a_place(tmp_path):
    for name in ("y" * 255, ODD, "é" * 127):
        place = table_store.place(tmp_path, f"/data/{name}", "lora")
        place.mkdir(parents=True)
        assert place != table_store.place(tmp_path, f"/other/{name}", "lora")


def test_what_moved_is_drawn_by_epoch(tmp_path, monkeypatch):
    """Rows that are lost leave no other in their place."""
    drawn = []
    monkeypatch.setattr(plotting, "save", lambda figure, path: drawn.append(figure))
    rows = [
        {"epoch": epoch, "importance": {"a": 1.0, "b": 3.0},
         "budget": {"b": 6 + epoch, "a": epoch}, "capacity": {"a": 10, "b": 20}}
        for epoch in (2, 3, 7)
    ]  # fmt: skip
    figures.allocation(tmp_path / "x.png", rows)
    (figure,) = drawn
    mesh = figure.axes[1].collections[0]
    edges = mesh.get_coordinates()[0, :, 0]
    assert edges.tolist() == [1.5, 2.5, 6.5, 7.5]
    density = mesh.get_array().reshape(2, 3)
    np.testing.assert_allclose(density, [[0.2, 0.3, 0.7], [0.4, 0.45, 0.65]])
    plt.close(figure)


def test_figures_of_one_round_have_one_tick_and_room_for_their_labels(monkeypatch):
    drawn, nothing = [], pathlib.Path()
    monkeypatch.setattr(plotting, "save", lambda figure, _: drawn.append(figure))
    row = {"epoch": 2, "train_loss": 1.0, "val_accuracy": 0.5}
    moved = {"importance": {"a": 1.0}, "budget": {"a": 1}, "capacity": {"a": 4}}
    figures.curves(nothing, {"LoRA": [row]}, "task")
    figures.allocation(nothing, [row | moved])
    for figure in drawn:
        figure.draw_without_rendering()
        for axes in figure.axes[:2]:
            low, high = sorted(axes.get_xlim())
            assert [x for x in axes.get_xticks() if low < x < high] == [2]
        high = figure.bbox.height
        for axes in figure.axes[2:]:  # bars of colours
            label = axes.yaxis.label.get_window_extent()
            assert label.y0 >= 0 and label.y1 <= high
        plt.close(figure)
