"""The programs of the README and of the pages in docs, as they stand there."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from places import ROOT

import snella_jax as snella
from snella_jax.models import vit


def test_the_ten_lines_load_a_checkpoint_and_train(tmp_path, monkeypatch):
    lines = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S
    )[0]
    shutil.copy(ROOT / "tests/assets/vit/original.npz", tmp_path / "ViT-B_16.npz")
    monkeypatch.chdir(tmp_path)
    images = np.load(ROOT / "tests/assets/vit/expected.npz")["images"]
    space = {"snella": snella, "vit": vit, "nnx": nnx, "optax": optax, "epochs": 3}
    losses = []

    @jax.jit
    def update(trainable, opt_state, budgets, frozen, batch):
        def loss_fn(trainable):
            model = nnx.merge(space["graphdef"], trainable, budgets, frozen)
            log_likelihood = jax.nn.log_softmax(model(batch))
            return -log_likelihood[jnp.arange(2), jnp.array([3, 8])].mean()

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, opt_state = space["tx"].update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    def step(*arguments):
        *state, loss = update(*arguments)
        losses.append(float(loss))
        return state

    space |= {"step": step, "batches": lambda: [images] * 3}
    exec(lines, space)
    assert losses[0] == np.float32(np.log(100)) and losses[-1] < losses[0]
    assert space["report"].density < 0.31
    plain = space["plain"](images)
    assert plain.shape == (2, 100) and np.all(np.isfinite(plain))


def test_the_program_of_the_data_guide_runs():
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text("utf-8"), re.S
    )
    assert len(blocks) == 1
    space = {}
    exec(blocks[0], space)
    assert space["batch"]["image"].shape == (32, 224, 224, 3)
    following = next(space["batches"])
    space["batches"].set_state(space["state"])
    again = next(space["batches"])
    np.testing.assert_array_equal(again["image"], following["image"])


def test_the_page_on_adapters_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/adapters.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    space = {}
    for block in blocks:
        exec(block, space)
    assert len(blocks) >= 9 and float(space["loss"]) < 1.2
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"pets", "pets.safetensors", "digits"}
    assert "fc1" in capsys.readouterr().out
    assert space["grads"].keys() == {"fc1", "out"}


def test_the_page_on_ones_own_models_runs(capsys):
    page = (ROOT / "docs/own_models.md").read_text("utf-8")
    space = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, space)
    assert "attn/kv/w[1]" in capsys.readouterr().out
    assert float(space["loss"]) < 1.2 and space["report"].density < 0.31
    assert all((v != 0).any() for v in jax.tree.leaves(space["trainable"]["attn"]))
