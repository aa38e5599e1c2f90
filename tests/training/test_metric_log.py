"""Logs that lost rows, or end in half a line, are read by epoch."""

import json
import pathlib
import shutil
from types import SimpleNamespace

import pictures
import pytest
from rich.console import Console

from experiments import ablate, vtab
from experiments.config.images import ImageConfig
from experiments.files import MismatchError, read
from experiments.methods.registry import METHODS
from experiments.runs import images, search
from experiments.runs.run import RunFailed
from experiments.training import fit, metric_log


def write(folder, *lines):
    (folder / metric_log.NAME).write_bytes(b"\n".join(lines))


def row(epoch, method="lora", **values):
    return json.dumps({"method": method, "epoch": epoch, **values}).encode()


@pytest.mark.parametrize(
    ("lines", "epochs"),
    [
        ([], []),
        ([row(1), row(2), b""], [1, 2]),
        ([row(1), row(2)], [1, 2]),  # whole, but for the end of its line
        ([row(1), row(2)[:-1]], [1]),
        ([row(1), row(2)[:20] + row(3), row(4), b""], [1, 4]),
        ([row(3), row(1), row(2, "snella"), b"", b"\0\0\0", b"\xff", b"7"], [1, 3]),
        ([row(1, loss=5), row(2), row(1, loss=4), b""], [1, 2]),
        ([row(None), row("1"), row(2), b'{"method": "lora"}'], [2]),
    ],
)
def test_rows_that_are_whole_are_read_by_epoch(lines, epochs, tmp_path):
    write(tmp_path, *lines)
    found = metric_log.of(tmp_path, "lora")
    assert [row["epoch"] for row in found] == epochs
    if lines and b"loss" in lines[0]:
        assert found[0]["loss"] == 4  # a run that went on logged it again
    metric_log.keep(tmp_path, "lora", 1)
    metric_log.log(tmp_path, {"method": "lora", "epoch": 9})
    kept = [row["epoch"] for row in metric_log.of(tmp_path, "lora")]
    assert kept == [*(epoch for epoch in epochs if epoch == 1), 9]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Four epochs, killed after the last; what it found, and its rows."""
    root = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        summary = pictures.killed("pets", "--methods", "lora", "--epochs", "4",
                                  "--lora.lr", "1e-2")  # fmt: skip
        rows = (root / "run" / metric_log.NAME).read_bytes().splitlines()
    return root, summary["methods"]["lora"], rows


LOST = {"train_loss", "seconds_per_step", "val_accuracy", "best_val_accuracy"}


@pytest.mark.parametrize("kept", [(1, 2, 3, 4), (4,), (1, 3), (2,), (1,), ()])
def test_a_run_goes_on_without_rows_and_takes_none_for_another(
    kept, begun, tmp_path, monkeypatch, capsys
):
    root, whole, rows = begun
    shutil.copytree(root, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    write(pathlib.Path("run"), *(rows[epoch - 1] for epoch in kept), b'{"method": "lo')
    found = vtab.main(["--resume", "run"])["methods"]["lora"]
    said = " ".join(capsys.readouterr().out.split())
    gone = [epoch for epoch in (1, 2, 3, 4) if epoch not in kept]
    many = "s" * (len(gone) > 1)
    lost = f"has lost epoch{many} {', '.join(map(str, gone))}, which curves"
    assert (lost in said) == bool(gone) == ("has lost" in said)
    for name in ("test_accuracy", "best_epoch", "best_test_accuracy", "weights_moved"):
        assert found[name] == whole[name]
    by_epoch = {epoch: json.loads(rows[epoch - 1]) for epoch in kept}
    last, best = (by_epoch.get(epoch, {}) for epoch in (4, whole["best_epoch"]))
    assert found["val_accuracy"] == last.get("val_accuracy")
    assert found["best_val_accuracy"] == best.get("val_accuracy")
    assert (found["seconds_per_step"] is None) == (not kept)
    assert read(pathlib.Path("run/summary.json"))["methods"]["lora"] == found


def test_a_trial_whose_accuracy_is_lost_is_no_trial(tmp_path, monkeypatch):
    """It is judged by the last epoch, and by no other."""
    only = SimpleNamespace(last_row={"epoch": 4})
    monkeypatch.setattr(search, "tune", lambda method, setting: only)
    task, quiet = SimpleNamespace(names=()), Console(quiet=True)
    setting = images.ImageRun(ImageConfig(), task, None, None, quiet, tmp_path)
    with pytest.raises(MismatchError, match="lost the accuracy of its last epoch"):
        search._trial("lora", setting, METHODS["lora"], 0)


def test_an_ablation_is_not_measured_by_what_is_left(tmp_path, monkeypatch):
    rows = [{"epoch": 1}, {"epoch": 4}]
    left = fit.Fitted(rows, None, None, None, None, last_row=rows[1])
    monkeypatch.setattr(ablate, "tune", lambda method, setting: left)
    with pytest.raises(MismatchError, match=r"has lost epochs 2, 3 of metrics\.jsonl"):
        ablate.measured("snella", SimpleNamespace(out=tmp_path))


@pytest.mark.parametrize("name", ["results.json", "config.json", "environment.json"])
def test_a_file_that_is_cut_off_is_named(name, begun, tmp_path, monkeypatch):
    shutil.copytree(begun[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    pathlib.Path("run", name).write_text('{"lora": {', "utf-8")
    with pytest.raises((RunFailed, SystemExit), match=rf"run/{name} is.* JSON"):
        vtab.main(["--resume", "run"])
