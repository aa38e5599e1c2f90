"""The toy of Stable Diffusion 3: its words, its file, and a training that is killed."""

import json

import jax
import numpy as np
import pytest
import small_emoji
from flax import nnx
from safetensors.numpy import load_file

from experiments.pretrained import toy_pictures, toy_sd3, train_toy_sd3
from experiments.pretrained.toy_sd3 import Toy, ToyConfig
from experiments.pretrained.toy_text import Words, vocabulary
from experiments.tasks import emoji
from snella_jax.models.sd3.mmdit import MMDiT

TINY = ToyConfig(
    width=16, depth=2, heads=2, patch=8, text_width=8, text_depth=2, text_heads=2
)


@pytest.fixture
def words():
    clip = small_emoji.tokenizer()
    return Words(clip, vocabulary(clip, ["red dog", "a Dog"]), 8)


def test_rows_of_words(words):
    # Ids of the three words rise as their rows do; then spares, start and end.
    ids = sorted(words.clip.to_ids("a dog red"))
    assert words.ids == (*ids, small_emoji.START, small_emoji.END)
    assert words.size == 3 + 8 + 2
    rows = [ids.index(words.clip.to_ids(word)[0]) for word in ("a", "red", "dog")]
    assert words.encode("A red  DOG") == [11, *rows, 12]
    assert words.padded(["", "dog"]).tolist() == [
        [11, 12, 12, 12, 12, 12, 12, 12],
        [11, rows[2], 12, 12, 12, 12, 12, 12],
    ]


def test_new_words_get_spare_rows(words):
    own = words.with_token("sks dog").with_token("Xyz")
    assert own.encode("sks xyz") == [11, 3, 4, 12]
    with pytest.raises(ValueError, match="the word 'sks'"):
        words.encode("a sks dog")
    with pytest.raises(ValueError, match="more than 8 words"):
        words.with_token(" ".join(f"new{'w' * i}" for i in range(9)))
    with pytest.raises(ValueError, match="7 tokens: expected at most 6"):
        words.encode("dog " * 7)


@pytest.fixture
def merges(monkeypatch):
    for module in (toy_sd3, train_toy_sd3):
        monkeypatch.setattr(module, "clip_tokenizer", small_emoji.tokenizer)


def test_a_file_gives_the_same_pictures(words, tmp_path, merges):
    config = ToyConfig(**{**vars(TINY), "length": 8})
    toy = Toy(config, words.size, rngs=nnx.Rngs(0))
    params = nnx.state(toy, nnx.Param)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [
        jax.random.normal(key, leaf.shape).astype("float16").astype("float32") / 8
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    nnx.update(toy, jax.tree.unflatten(structure, drawn))
    path = tmp_path / "toy.safetensors"
    toy_sd3.save(toy, words.ids, path)
    assert load_file(path)["tower/embed/embedding"].dtype == np.float16
    loaded = toy_sd3.load("sks", path)
    assert isinstance(loaded.transformer, MMDiT)
    options = {"size": toy_sd3.SIZE, "steps": 2, "key": jax.random.key(0)}
    expected = toy_sd3.pipeline(toy, words)("red dog", **options)
    found = loaded("red dog", **options)
    assert (np.asarray(found) == np.asarray(expected)).all()
    assert loaded.encode("a sks dog")[0].shape == (1, 8, 8)


def test_a_toy_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_toy_sd3 makes it"):
        toy_sd3.load(path=tmp_path / "none")
    path = tmp_path / "toy.safetensors"
    path.write_bytes(b"<!doctype html>")
    with pytest.raises(ValueError, match="no toy's file"):
        toy_sd3.load(path=path)


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, merges, monkeypatch):
    monkeypatch.setattr(emoji, "COUNT", len(small_emoji.NAMES) - 1)
    package = small_emoji.package(tmp_path / "package")
    sheets = []
    monkeypatch.setattr(toy_pictures, "sheet", lambda _, path: sheets.append(path))
    shape = [f"--toy.{name}={n}" for name, n in vars(TINY).items()]
    options = ["--every=2", "--warmup=1", "--batch=7", *shape]

    def train(name, updates=5):
        where = [f"--out={tmp_path / name}", f"--emoji={package}"]
        train_toy_sd3.main([*where, f"--updates={updates}", *options])
        return load_file(tmp_path / name / train_toy_sd3.WEIGHTS)

    whole = train("whole")

    def killed(_, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy_pictures, "sheet", killed)
        train("killed", updates=9)
    resumed = train("killed")
    assert all((whole[name] == resumed[name]).all() for name in whole)
    log = (tmp_path / "killed" / train_toy_sd3.LOG).read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in log]
    assert [row["update"] for row in rows] == [2, 4, 5]
    assert rows[2]["passes"] == round(5 * 7 / 12, 1)  # 14 emoji, two of them left out
    first = json.loads(
        (tmp_path / "whole" / train_toy_sd3.LOG).read_text("utf-8").split("\n")[0]
    )
    assert rows[0]["loss"] == first["loss"]
    assert len(sheets) == 5
    with pytest.raises(SystemExit, match="after 5 updates it is too late"):
        train("whole", updates=4)
    longer = train("whole", updates=7)  # finished, and the rate falls after six
    assert any((whole[name] != longer[name]).any() for name in whole)
    with pytest.raises(SystemExit, match="another training"):
        train_toy_sd3.main([f"--out={tmp_path / 'whole'}", f"--emoji={package}"])


def test_the_rate_falls_in_the_last_fifth(tmp_path):
    config = train_toy_sd3.TrainConfig(tmp_path, updates=1000, warmup=100, lr=0.1)
    rates = [float(train_toy_sd3._schedule(config)(i)) for i in (0, 50, 100, 800, 900)]
    np.testing.assert_allclose(rates, [0, 0.05, 0.1, 0.1, (0.1 + 0.001) / 2], rtol=1e-6)
    assert float(train_toy_sd3._schedule(config)(1000)) == pytest.approx(0.001)
