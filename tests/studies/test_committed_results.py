"""The committed results are still read, and no number in them changes."""

import json
import shutil

import pytest
from places import RESULTS

from experiments import ablate, compare, plotting, report


@pytest.mark.parametrize("program, name", [
    (compare, "comparison"), (ablate, "ablations")
])  # fmt: skip
def test_a_table_is_made_again(program, name, tmp_path, monkeypatch):
    """With every setting that a file from before some of them lacks."""
    monkeypatch.setattr(plotting, "save", lambda figure, _: plotting.plt.close(figure))
    out = tmp_path / name
    shutil.copytree(RESULTS / name, out)
    program.main(["--table_only", "--out", str(out)])
    for file in ("report.md", "report.json"):
        assert (out / file).read_bytes() == (RESULTS / name / file).read_bytes()
    known, now = (
        json.loads((folder / "results.json").read_text("utf-8"))
        for folder in (RESULTS / name, out)
    )
    assert now["rows"] == known["rows"] and now.get("inputs") == known.get("inputs")
    for setting, value in known["shared"].items():
        if isinstance(value, dict):
            assert value.items() <= now["shared"][setting].items()
        else:
            assert now["shared"][setting] == value


def test_finished_runs_are_reported_again(tmp_path):
    report.main([str(RESULTS / "quickstart"), "--out", str(tmp_path)])
    for file in ("report.md", "report.json"):
        assert (tmp_path / file).read_bytes() == (
            RESULTS / "quickstart" / file
        ).read_bytes()
