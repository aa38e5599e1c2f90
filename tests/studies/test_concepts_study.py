"""Updates of concepts, compared by hand and read from their files."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snella_jax as snella
from experiments import files
from experiments.studies import concepts

ONE, OTHER = [[3.0, 0.0], [0.0, 4.0]], [[3.0, 0.0], [4.0, 0.0]]
NONE = [[0.0, 0.0], [0.0, 0.0]]
UPDATES = {
    "last/q": np.array([ONE, OTHER, NONE]),
    "blocks/q[0]": np.array([ONE, ONE, ONE]),
}


def test_numbers_by_hand():
    """Of the pairs in the last block only the first has a cosine: 9 / 25."""
    others = {"last/q": np.array([ONE, ONE, NONE]), "blocks/q[0]": np.zeros((3, 2, 2))}
    found = concepts.compared(UPDATES, others, depth=3)
    rows = {row["name"]: row for row in found.pop("matrices")}
    assert [*rows] == ["blocks/q[0]", "last/q"]  # by depth
    assert rows["last/q"] == {
        "name": "last/q",
        "block": 2,
        "density": 0.3333,
        "similarity": 0.36,
        "other_starts": 1.0,
        "same_concept": 0.68,  # of 1 and 0.36
    }
    assert rows["blocks/q[0]"]["similarity"] == 1.0
    assert rows["blocks/q[0]"]["same_concept"] is None  # of updates that are 0
    # Counts: 2 1 1 0 in the last block; 3 0 0 3 in the other.
    quarter = 1 / 8  # of eight weights
    assert found.pop("frequency") == [3 * quarter, 2 * quarter, quarter, 2 * quarter]
    last, other = [1 / 4, 1 / 2, 1 / 4, 0], [1 / 8, 3 / 8, 3 / 8, 1 / 8]
    assert found.pop("chance") == [
        (a + b) / 2 for a, b in zip(last, other, strict=True)
    ]
    assert found == {"similarity": 0.68, "other_starts": 1.0, "same_concept": 0.68}


class Model(nnx.Module):
    def __init__(self):
        self.config = types.SimpleNamespace(depth=3)
        self.blocks = nnx.Dict(q=nnx.Dict(kernel=nnx.Param(jnp.ones((2, 4, 3)))))
        self.last = nnx.Dict(q=nnx.Dict(kernel=nnx.Param(jnp.ones((4, 3)))))
        self.bias = nnx.Param(jnp.ones(3))


def changed(place):
    """A model of which a weight in the second block and one in the last has moved."""
    model = Model()
    for own, index in ((model.blocks, (1, *place)), (model.last, place)):
        kernel = own["q"]["kernel"]
        kernel.set_value(kernel[...].at[index].add(0.5))
    return model


@pytest.fixture
def deltas(tmp_path, monkeypatch):
    """Files of two concepts, as runs leave them."""
    loaded = types.SimpleNamespace(transformer=Model())
    monkeypatch.setattr(concepts.sd3_models, "load", lambda _: loaded)
    paths = []
    for name, place in (("dog", (0, 1)), ("cat", (2, 2))):
        paths.append(tmp_path / name / "deltas" / "snella.safetensors")
        paths[-1].parent.mkdir(parents=True)
        snella.save_delta(paths[-1], Model(), changed(place))
    return [str(path) for path in paths]


def test_files_of_two_concepts(deltas, tmp_path, capsys):
    argv = ["--matrix", "last/q", "--out", str(tmp_path)]
    result = concepts.main(["--deltas", *deltas, "--others", *deltas, *argv])
    assert files.read(tmp_path / "concepts.json") == result
    assert (tmp_path / "concepts.png").stat().st_size > 10_000
    assert result["concepts"] == ["dog", "cat"]
    assert (result["similarity"], result["same_concept"]) == (0.0, 1.0)
    # The first block's matrix is moved by neither.
    assert [row["name"] for row in result["matrices"]] == ["blocks/q[1]", "last/q"]
    moved = 4 / 24
    assert result["frequency"] == pytest.approx([1 - moved, moved, 0], abs=1e-5)
    assert "one concept, two starts: 1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--matrix", "blocks/k[0]"], r"expected one of blocks/q\[1\], last/q"),
        (["--others", "a"], "1 others and 2 deltas"),
    ],
)
def test_what_it_cannot_compare(argv, message, deltas, tmp_path):
    with pytest.raises(SystemExit, match=message):
        concepts.main(["--deltas", *deltas, "--out", str(tmp_path), *argv])
    with pytest.raises(SystemExit, match="at least two concepts"):
        concepts.main(["--deltas", deltas[0], "--out", str(tmp_path)])
