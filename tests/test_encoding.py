"""Text files are UTF-8 whatever the locale is."""

import ast
import json
import os
import shutil
import subprocess
import sys

import pictures
import pytest
from places import ROOT

FILES = [
    path for part in ("snella_jax", "experiments", "tests")
    for path in sorted((ROOT / part).rglob("*.py"))
]  # fmt: skip
TEXT = {"r", "w", "a", "x", "rt", "wt", "at", "r+", "w+"}
PROGRAM = r"""
import locale, sys, warnings
warnings.filterwarnings(
    "error", category=EncodingWarning, module="experiments|snella_jax"
)
from pathlib import Path
from experiments import files, report, vtab
from experiments.tasks import catalogue
from snella_jax.files.readers import read_json

assert locale.getencoding() != "utf-8", locale.getencoding()
vtab.main(sys.argv[1:])
for file in ("results.json", "summary.json"):
    Path("run", file).unlink()
vtab.main(["--resume", "run"])
report.main(["run", "--out", "report"])
for name in ("table.csv", "lists"):
    task = catalogue.load(name)
    assert [part[1]["label"] for part in (task.train, task.validation, task.test)] == [
        1, 1, 1
    ]
assert catalogue.load(files.read(Path("task.json"))).name == task.name
(model,) = Path("weights").iterdir()
print(ascii(read_json(model / "config.json")["id2label"]))
files.replace(Path("dash.md"), "\u2013\n")
"""


def is_text(call):
    """Returns True if a call opens a text file without naming an encoding."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    given = {word.arg for word in call.keywords}
    if "encoding" in given:
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) < {"read_text": 1, "write_text": 2}[name]
    if name in ("run", "Popen", "check_output"):
        return bool(given & {"text", "universal_newlines"})
    modes = [a.value for a in call.args if isinstance(a, ast.Constant)]
    modes += [w.value.value for w in call.keywords if w.arg == "mode"]
    modes = [mode for mode in modes if isinstance(mode, str)]
    builtin = isinstance(call.func, ast.Name) and not modes
    return name == "open" and (builtin or not TEXT.isdisjoint(modes))


@pytest.mark.parametrize("text, found", [
    ("p.read_text()", True), ("p.read_text('utf-8')", False), ("open(p)", True),
    ("p.write_text(x)", True), ("p.write_text(x, encoding='utf-8')", False),
    ("p.open('w')", True), ("p.open('rb')", False), ("open(p, mode='a')", True),
    ("gzip.open(p, 'rt')", True), ("run(x, text=True)", True), ("Image.open(p)", False),
])  # fmt: skip
def test_what_lacks_an_encoding_is_found(text, found):
    assert is_text(ast.parse(text, mode="eval").body) == found


def test_every_text_file_is_opened_as_utf_8():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call) and is_text(node)
    ]
    assert found == []


@pytest.mark.slow  # a process that compiles by itself
def test_a_run_is_the_same_where_the_locale_is_not_utf_8(tmp_path):
    """Its data, its model and the model's classes have names beyond ASCII."""
    name = "ü-猫"
    pictures.draw(tmp_path / name)
    model = tmp_path / "weights" / name
    shutil.copytree(pictures.CLASSIFIER, model)
    config = json.loads((model / "config.json").read_text("utf-8"))
    config["id2label"] = dict.fromkeys(config["id2label"], "ü猫")
    text = json.dumps(config, ensure_ascii=False)
    (model / "config.json").write_text(text, "utf-8")
    table = ["path,label,split"]
    (tmp_path / "lists").mkdir()
    for part, file in (("train", "train800"), ("val", "val200"), ("test", "test")):
        images = [f"{name}/{part}/{kind}/0.png" for kind in ("dark", "light")]
        table += [f"{image},{label},{part}" for label, image in enumerate(images)]
        lines = [f"../{image} {label}" for label, image in enumerate(images)]
        (tmp_path / f"lists/{file}.txt").write_text("\n".join(lines), "utf-8")
    (tmp_path / "table.csv").write_text("\n".join(table), "utf-8")
    task = json.dumps(f"{name}/../lists")
    (tmp_path / "task.json").write_text(task, "utf-8")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    options = ["-X", "warn_default_encoding", "-c", PROGRAM]
    words = pictures.words(name, "--methods=lora", "--epochs=1", "--out=run")
    done = subprocess.run(
        [sys.executable, *options, *words],
        cwd=tmp_path,
        env=os.environ | locale | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="ascii",
    )
    assert done.returncode == 0, done.stderr
    assert r"'\xfc\u732b'" in done.stdout.splitlines()[-1]
    assert (tmp_path / "dash.md").read_bytes() == "\N{EN DASH}\n".encode()
    assert f"| {name} | " in (tmp_path / "report/report.md").read_text("utf-8")
    known = json.loads((tmp_path / "run/config.json").read_text("utf-8"))
    assert os.fsencode(known["task"]) == name.encode()
