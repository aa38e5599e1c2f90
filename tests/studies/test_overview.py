"""The overview of methods on models and benchmarks, from reports written by hand."""

import pytest

from experiments import files
from experiments.reports.text import MISSING
from experiments.studies import overview


def cell(*seeds):
    mean, apart = sum(seeds) / len(seeds), len(seeds) > 1
    return {
        "mean": mean,
        "deviation": max(seeds) - mean if apart else None,
        "seeds": {str(seed): value for seed, value in enumerate(seeds)},
    }


def column(method, setup="", paper=False, **tasks):
    return {"method": method, "setup": setup, "paper": paper, "tasks": tasks}


def written(folder, columns, percent=True, setups=("vit_ti16, 56 pixels",)):
    tasks = dict.fromkeys([t for own in columns for t in own["tasks"]], "own")
    metric = {"name": "accuracy" if percent else "mdice", "percent": percent}
    report = {"setups": list(setups), "tasks": tasks, "columns": columns}
    files.write(folder / "report.json", report | {"metric": metric, "failed": []})
    return folder


def test_a_panel_for_each_task_with_two_methods(tmp_path, capsys):
    pets = written(tmp_path / "pets", [
        column("linear probe", cats=cell(50)),
        column("LoRA-8", cats=cell(70, 72), dogs=cell(80)),
        column("LoRA-8, random weights", cats=cell(10), dogs=cell(20)),
        column("SNELLA-8", cats=cell(71, 75)),
        column("SNELLA-8", paper=True, cats=cell(99), dogs=cell(99)),
    ])  # fmt: skip
    polyps = written(
        tmp_path / "polyps",
        [column("SSF", kvasir=cell(0.8)), column("SNELLA-8", kvasir=cell(0.75))],
        percent=False,
    )
    out = tmp_path / "out"
    found = overview.main(["--reports", str(pets), str(polyps), "--out", str(out)])
    cats, kvasir = found["panels"]
    assert (cats["report"], cats["task"]) == ("pets", "cats")
    assert cats["setup"] == "vit_ti16, 56 pixels"
    assert cats["rows"] == [
        {"method": "LoRA", "label": "LoRA-8", "mean": 71, "deviation": 1, "seeds": 2},
        {"method": "SNELLA", "label": "SNELLA-8", "mean": 73, "deviation": 2,
         "seeds": 2},
    ]  # fmt: skip
    assert [row["label"] for row in kvasir["rows"]] == ["SSF", "SNELLA-8"]
    assert files.read(out / "overview.json") == found
    assert (out / "overview.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("71.0", "73.0", "0.800", "0.750", MISSING))


def test_setups_have_panels_of_their_own(tmp_path):
    columns = [
        column(method, setup, cats=cell(value))
        for setup in ("vit_b16", "swin_b")
        for method, value in (("LoRA-8", 70), ("SNELLA-32", 72))
    ]
    panels = overview.panels_of(written(tmp_path, columns), ["LoRA", "SNELLA"])
    assert [panel["setup"] for panel in panels] == ["swin_b", "vit_b16"]


def test_what_cannot_be_drawn_is_said(tmp_path):
    def error(folder, *options):
        with pytest.raises(SystemExit) as stopped:
            overview.main(["--reports", str(folder), *options])
        return str(stopped.value)

    assert "There is no" in error(tmp_path)
    files.write(tmp_path / "report.json", {"rows": []})
    assert "has no columns of methods" in error(tmp_path)
    ranks = [column(f"LoRA-{rank}", cats=cell(70)) for rank in (8, 16)]
    two = written(tmp_path / "two", ranks)
    assert "LoRA may be LoRA-8, LoRA-16 on cats" in error(two)
    assert "No task has two of SSF, GPS" in error(two, "--methods", "SSF", "GPS")
