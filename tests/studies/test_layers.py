"""What runs allotted to their layers, by hand and of a committed run."""

import pytest
from places import RESULTS

from experiments import files
from experiments.studies import layers


def move(epoch, importance, budget):
    names = ("blocks/mlp/fc1[0]", "blocks/mlp/fc2[0]", "blocks/mlp/fc1[1]", "head")
    values = {"importance": importance, "budget": budget, "capacity": (4, 12, 10, 5)}
    return {"epoch": epoch} | {
        kind: dict(zip(names, own, strict=True)) for kind, own in values.items()
    }


def test_blocks_by_hand():
    """A block is the mean of its scores, and the sum of its weights; the head none."""
    moves = [
        move(2, (1.0, 3.0, 2.0, 9.0), (4, 8, 5, 5)),
        move(4, (0.5, 0.5, 1.5, 9.0), (0, 4, 8, 5)),
    ]
    assert layers.by_block(moves) == {
        "blocks": ["0", "1"],
        "epochs": [2, 4],
        "importance": [[2.0, 0.5], [2.0, 1.5]],
        "sparsity": [[0.25, 0.75], [0.5, 0.2]],
        "slope": -0.55,
        "drift": 0.25,  # from a half and a half to a quarter and three
        "unevenness": 0.25,
        "frozen": 0.25,
    }


def test_a_committed_run(tmp_path, capsys):
    run = RESULTS / "elpv" / "seed0"
    out = tmp_path / "out"
    (row,) = layers.main(["--runs", str(run), "--out", str(out)])
    assert files.read(out / "layers.json") == [row]
    assert (row["title"], row["blocks"]) == (
        "elpv, sensitivity",
        [*map(str, range(12))],
    )
    assert row["epochs"] == [*range(2, 9)]
    # All blocks of a ViT have as many weights.
    kept = 1 - sum(own[-1] for own in row["sparsity"]) / 12
    assert kept == pytest.approx(0.3, abs=1e-3)
    for name in ("depth", "evolution"):
        assert (out / f"{name}.png").stat().st_size > 10_000
    assert "elpv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--titles", "one", "two"], "2 titles and 1 runs"),
        (["--method", "lora"], "no finished run in which budgets of lora moved"),
    ],
)
def test_what_it_cannot_compare(argv, message, tmp_path):
    run = ["--runs", str(RESULTS / "elpv" / "seed0"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=message):
        layers.main([*run, *argv])


def test_the_committed_scores():
    """What the docs say of them."""
    rows = files.read(RESULTS / "layers" / "scores" / "layers.json")
    still = {row["score"]: [own[-1] for own in row["sparsity"]] for row in rows}
    apart = {name: max(own) - min(own) for name, own in still.items()}
    assert apart["magnitude"] < apart["sensitivity"] < apart["merged_magnitude"]
    drift = {row["score"]: row["drift"] for row in rows}
    assert max(drift, key=lambda name: drift[name]) == "sensitivity"


def test_the_committed_tasks():
    rows = files.read(RESULTS / "layers" / "tasks" / "layers.json")
    slope = {row["task"]: row["slope"] for row in rows}
    assert slope["caltech101"] < -0.04 and slope["elpv"] > 0.04
    others = abs(slope["tuxpaint"]), abs(slope["dsprites_loc_rerendered"])
    assert max(others) < 0.02
