"""The comparison of sketched with exact gradients, against numbers made by hand."""

import json

import pytest

from experiments.studies import sketches
from experiments.studies.sketches import STUDY, compared

EXACT, HALF = STUDY.variants[0].name, STUDY.variants[1].name


def result(accuracy, budgets, scores=(1.0, 2.0, 3.0), loss=0.5):
    own = {"test_accuracy": accuracy, "train_loss": loss}
    return own | {"budgets": list(budgets), "scores": list(scores)}


def runs(gaps, budgets=(1, 2, 3)):
    """Two tasks with three seeds; exact budgets of the third seed are reversed."""
    cells = [(task, str(seed)) for task in ("birds", "cars") for seed in range(3)]
    exact = {
        cell: result(0.9, (3, 2, 1) if cell[1] == "2" else (1, 2, 3)) for cell in cells
    }
    half = {
        cell: result(0.9 + gap / 100, budgets, (3.0, 2.0, 1.0))
        for cell, gap in zip(cells, gaps, strict=True)
    }
    names = {variant.name: {} for variant in STUDY.variants}
    return names | {EXACT: exact, HALF: half}


def rows(gaps, **changes):
    first, second, *rest = compared(runs(gaps, **changes))
    assert all(row["pairs"] == 0 and row["accuracy"] is None for row in rest)
    return first, second


def test_differences_are_of_pairs():
    """Deviation 0.5, six pairs: 2.5706 * 0.5 / sqrt(6) = 0.5247."""
    first, second = rows([0.5, -0.5, 0.5, -0.5, 0.25, -0.25])
    deviation = (4 * 0.25 + 2 * 0.0625) / 5
    assert second["difference"] == pytest.approx(0)
    assert second["error"] == pytest.approx(2.570582 * (deviation / 6) ** 0.5, rel=1e-6)
    assert first["accuracy"] == pytest.approx(90) and "difference" not in first


def test_correlations_stand_beside_those_of_other_seeds():
    """Of three pairs of seeds a task, one agrees: (1 - 1 - 1) / 3."""
    first, second = rows([0.0] * 6)
    assert first["budgets"] == pytest.approx(-1 / 3)
    assert first["scores"] == pytest.approx(1)
    assert second["budgets"] == pytest.approx((1 + 1 - 1) / 3)
    assert second["scores"] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("gap", "budgets", "advised"),
    [(-0.9, (1, 2, 3), True), (-1.1, (1, 2, 3), False), (0.5, (3, 2, 1), True)],
)
def test_a_row_is_advised_by_interval_and_budgets(gap, budgets, advised):
    """All pairs alike, so the interval is a point; reversed budgets correlate -1/3."""
    _, second = rows([gap] * 6, budgets=budgets)
    assert second["advised"] is advised


def test_five_pairs_advise_nothing():
    found = runs([0.5] * 6)
    del found[HALF]["cars", "2"]
    row = compared(found)[1]
    assert row["pairs"] == 5 and row["error"] == 0 and row["advised"] is None


def test_scores_that_grow_are_shown():
    """Medians of 4 and 1 where the exact runs have 2."""
    found = runs([0.0] * 6)
    for (_, seed), own in found[HALF].items():
        own["scores"] = [1.0, 1.0, 9.0] if seed == "0" else [1.0, 4.0, 9.0]
    ratios = [0.5, 2, 2] * 2
    expected = 2 ** (sum(1 if ratio == 2 else -1 for ratio in ratios) / 6)
    assert compared(found)[1]["score_ratio"] == pytest.approx(expected)


def test_a_row_whose_budgets_differ_more_than_seeds_do_is_not_advised():
    found = runs([0.0] * 6)
    for cell, own in found[EXACT].items():
        own["budgets"] = [1, 2, 3]
        found[HALF][cell]["budgets"] = [1, 3, 2]
    assert compared(found)[1]["advised"] is False


def test_the_command_reads_folders_of_the_ablation(tmp_path, capsys):
    tasks: dict = {}
    for name, cells in runs([0.5] * 6).items():
        for (task, seed), own in cells.items():
            seeds = tasks.setdefault(task, {}).setdefault(name, {"seeds": {}})
            seeds["seeds"][seed] = own
    for task, own in tasks.items():
        (tmp_path / task).mkdir()
        text = json.dumps({"rows": {task: own}})
        (tmp_path / task / "results.json").write_text(text, "utf-8")
    folders = [str(tmp_path / task) for task in tasks]
    sketches.main(["--runs", *folders, "--out", str(tmp_path / "report")])
    assert "+0.5" in capsys.readouterr().out
    made = json.loads((tmp_path / "report/report.json").read_text("utf-8"))
    assert [row["pairs"] for row in made] == [6, 6, 0, 0, 0, 0]
    assert "1 of 2 | 6 | 90.5 | +0.5" in (tmp_path / "report/report.md").read_text(
        "utf-8"
    )


def finished(folder, sketch, seed, dice, budgets, activation="gelu"):
    """Writes what the comparison reads of a run on masks."""
    folder.mkdir()
    config = {"task": "/data/kvasir", "activation": activation}
    config |= {"snella": {"sketch": sketch}}
    metrics = [{"name": "loss", "percent": False}, {"name": "dice", "percent": True}]
    entry = {"test_loss": 0.3, "test_dice": dice}
    summary = {"seed": seed, "metrics": metrics, "methods": {"snella": entry}}
    moved = {"budget": budgets, "importance": {"q": 0.5, "k": 0.25}}
    rows = [
        {"method": "snella", "epoch": 1, "train_loss": 0.9, "budget": {"q": 1, "k": 1}},
        {"method": "snella", "epoch": 2, "train_loss": 0.4, **moved},
        {"method": "snella", "epoch": 3, "train_loss": 0.2},
    ]
    for name, content in (("config", config), ("summary", summary)):
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, "utf-8")
    return str(folder)


def test_the_command_reads_folders_of_runs(tmp_path, capsys):
    """A row by its settings; budgets in the order of names, the last that moved."""
    runs = [
        finished(tmp_path / "0", 1, 0, 0.80, {"q": 9, "k": 2}),
        finished(tmp_path / "1", 1, 1, 0.80, {"q": 3, "k": 2}),
        finished(tmp_path / "2", 4, 0, 0.82, {"q": 7, "k": 1}),
        finished(tmp_path / "3", 4, 1, 0.80, {"q": 1, "k": 4}),
        finished(tmp_path / "4", 4, 1, 0.75, {"q": 4, "k": 1}, "gelu2"),
    ]
    sketches.main(["--runs", *runs, "--out", str(tmp_path / "report")])
    assert "tasks: 1" in capsys.readouterr().out
    made = json.loads((tmp_path / "report/report.json").read_text("utf-8"))
    pairs = {row["title"]: row for row in made if row["pairs"]}
    assert list(pairs) == ["all rows, exact", "1 of 4", "1 of 4, in steps"]
    assert pairs["1 of 4"]["pairs"] == 2
    assert pairs["1 of 4"]["difference"] == pytest.approx(1.0)
    assert pairs["1 of 4"]["train_loss"] == pytest.approx(0.2)
    assert pairs["1 of 4"]["budgets"] == pytest.approx(0)  # one agrees, one does not
    assert pairs["1 of 4, in steps"]["difference"] == pytest.approx(-5.0)


def test_a_cell_that_is_given_twice_is_refused(tmp_path):
    runs = [finished(tmp_path / n, 1, 0, 0.8, {"q": 9, "k": 2}) for n in "ab"]
    with pytest.raises(SystemExit, match="given before"):
        sketches.main(["--runs", *runs, "--out", str(tmp_path / "report")])


def test_a_run_with_settings_of_no_row_is_refused(tmp_path):
    run = finished(tmp_path / "a", 3, 0, 0.8, {"q": 9, "k": 2})
    with pytest.raises(SystemExit, match="found sketch=3, activation=gelu"):
        sketches.main(["--runs", run, "--out", str(tmp_path / "report")])


OLDER = {"test_accuracy": 0.9, "train_loss": 0.5}  # made before budgets were kept


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ({}, "has no run of a row"),
        ({"birds": {HALF: {"seeds": {"0": result(0.9, (1, 2))}}}}, "no exact run"),
        (
            {"birds": {EXACT: {"seeds": {"0": result(0.9, (1, 2)), "1": OLDER}}}},
            "one without budgets",
        ),
    ],
)
def test_folders_without_exact_runs_or_budgets_are_refused(rows, match, tmp_path):
    text = json.dumps({"rows": rows})
    (tmp_path / "results.json").write_text(text, "utf-8")
    with pytest.raises(SystemExit, match=match):
        sketches.main(["--runs", str(tmp_path), "--out", str(tmp_path / "report")])
