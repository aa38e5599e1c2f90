"""The programs of the README and of the pages in docs, as they stand there."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest
from compiled import called
from documented import blocks
from flax import nnx
from places import ROOT
from words import Words

import snella_jax as snella
from experiments.data import questions
from experiments.data.prompts import TEMPLATES

BASE = (
    'vit.create("vit_ti16", depth=2, image_size=32, num_classes=10, rngs=nnx.Rngs(0))'
)
LOADED = 'vit.load("ViT-B_16.npz", image_size=32, num_classes=10)'


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """From a checkpoint, which the README has in a comment; CI runs it as it stands."""
    (example,) = blocks("README.md")
    assert BASE in example and LOADED in example
    shutil.copy(ROOT / "tests/assets/vit/original.npz", tmp_path / "ViT-B_16.npz")
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(example.replace(BASE, LOADED), space)
    created = nnx.eval_shape(lambda: eval(BASE, space))
    assert created.head.kernel.shape == (192, 10)
    losses = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 5 and float(losses[-1]) < float(losses[0]) < np.log(10)
    assert abs(space["state"].density - 0.3) < 0.01
    images, plain = space["x"], space["plain"]
    with pytest.raises(ValueError, match="no adapters"):
        snella.sparsity(plain)
    adapted = called(space["state"].model, images)
    np.testing.assert_allclose(called(plain, images), adapted, atol=1e-4)
    loaded = snella.load(space["base"], "my_adapter")
    np.testing.assert_array_equal(called(loaded, images), adapted)


def test_the_programs_of_the_quickstart_end_with_the_same_numbers(capsys):
    """Bit for bit: `Tuning`, and today's calls in a loop of one's own."""
    tuned, own = blocks("docs/quickstart.md")
    exec(tuned, space := {})
    *epochs, final = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in epochs]
    assert len(losses) == 10 and losses[-1] < 0.7 * losses[0]
    assert final.startswith("{'density': 0.3, 'density/fc1': ")
    with pytest.raises(ValueError, match="no adapters"):
        snella.sparsity(space["model"])
    state, plain = space["state"], nnx.state(space["model"])
    exec(own, space)
    *again, final = capsys.readouterr().out.splitlines()
    assert again == epochs and final.startswith("{'fc1': ")
    assert final.endswith("density 0.30")
    for name in ("trainable", "budgets", "opt_state"):
        numbers = map(jax.tree.leaves, (getattr(state, name), space[name]))
        chex.assert_trees_all_equal(*numbers)
    chex.assert_trees_all_equal(plain, nnx.state(space["model"]))


def test_the_program_of_the_data_guide_runs():
    (program,) = blocks("docs/data.md")
    exec(program, space := {})
    assert space["batch"]["image"].shape == (32, 224, 224, 3)
    following = next(space["batches"])
    space["batches"].set_state(space["state"])
    again = next(space["batches"])
    np.testing.assert_array_equal(again["image"], following["image"])


def test_the_questions_of_the_page_on_language_models_are_read(tmp_path, monkeypatch):
    """The program writes ten; the other record shown has candidates, too."""
    monkeypatch.chdir(tmp_path)
    (program,) = blocks("docs/language.md")
    exec(program, {})
    page = (ROOT / "docs/language.md").read_text("utf-8")
    path, shown = tmp_path / "mine.json", page.split("```json\n")[1].split("```")[0]
    records = json.loads(path.read_text("utf-8"))
    for extra, sizes in ([], [6, 2, 2]), ([json.loads(shown)], [7, 2, 2]):
        path.write_text(json.dumps(records + extra), "utf-8")
        task = questions.load(path, Words(), questions.Reading(TEMPLATES["plain"]))
        assert [len(x) for x in (task.train, task.validation, task.test)] == sizes
        assert task.majority == {"mine": 1 / 2}


def test_the_page_on_adapters_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    programs, space = blocks("docs/adapters.md"), {}
    for program in programs:
        exec(program, space)
    assert len(programs) >= 9 and float(space["loss"]) < 1.2
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"pets", "pets.safetensors", "digits", "lora"}
    assert "fc1" in capsys.readouterr().out
    assert space["grads"].keys() == {"fc1", "out"}


def test_the_page_on_ones_own_models_runs(capsys):
    space = {}
    for program in blocks("docs/own_models.md"):
        exec(program, space)
    assert "attn/kv/w[1]" in capsys.readouterr().out
    assert float(space["loss"]) < 1.2 and space["report"].density < 0.31
    assert all((v != 0).any() for v in jax.tree.leaves(space["trainable"]["attn"]))


def test_the_page_on_extending_runs(tmp_path, monkeypatch):
    """No weight has moved further than its kernel's limit, but some have."""
    (program,), space = blocks("docs/extending.md"), {}
    monkeypatch.chdir(tmp_path)
    exec(program, space)
    assert (tmp_path / "bounded.safetensors").is_file()
    before, after = (
        nnx.state(space[name].blocks, nnx.Param) for name in ("base", "plain")
    )
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), before, after)
    assert 0.005 < max(jax.tree.leaves(moved)) <= 0.02 + 1e-6
    with pytest.raises(ValueError, match=r"no kernel of snella\.kernels"):
        space["state"].save("adapter")


def test_the_page_on_scaling_runs():
    """Its step on four devices is that of one, and so is its layer."""
    space, programs = {}, blocks("docs/scaling.md")
    exec(programs[0], space)
    names = ("trainable", "budgets", "frozen")
    trainable, *rest = (jax.tree.map(np.asarray, space[name]) for name in names)
    for program in programs[1:]:
        exec(program, space)
    assert len(programs) == 3
    x = np.asarray(space["x"])
    step, opt_state = jax.jit(space["step"]), space["tx"].init(trainable)
    for expected in space["losses"]:
        arguments = trainable, opt_state, *rest, x, np.sin(x[:, :2])
        trainable, opt_state, loss = step(*arguments)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert space["losses"][-1] < space["losses"][0]
    w0, factors = np.ones((8, 32), np.float32), space["factors"]
    y = snella.adapted_dense(x, w0, factors, 100, kernel=space["mix_k"])
    np.testing.assert_allclose(space["y"], y, rtol=1e-5, atol=1e-5)


def test_the_page_on_flax_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space, programs = {}, blocks("docs/recipes.md")
    for program in programs:
        exec(program, space)
    assert len(programs) == 9 and space["report"].density < 0.31
    assert "blocks/fc[1][2]" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"training", "adapted"}
