"""What tuned models keep and withstand, against plain NumPy and hand-made models."""

import dataclasses
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pictures import CLASSIFIER, draw
from PIL import Image

from experiments import compare
from experiments.data.source import Arrays, few, labels_of
from experiments.data.transforms import Transform
from experiments.studies import corruptions, sparsity, sparsity_report, tuned
from experiments.studies.corruptions import KINDS, SEVERITIES, Corrupted
from experiments.studies.recorded import unpacked

WORDS = [
    "--config=real_tasks", f"--run.model={CLASSIFIER}", "--run.image_size=24",
    "--run.mesh=data=1", "--run.batch=4", "--run.targets=blocks/mlp/fc1",
    "--run.epochs=1", "--run.warmup_epochs=0", "--search_epochs=1", "--seeds=0",
    "--methods=full", "--keep_models", "--run.test_images=6",
    "--tasks", "birds", "trees",
    "--pool",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Full fine-tuning on two tasks, and all that is measured of it."""
    root = tmp_path_factory.mktemp("sparsity")
    for name in ("birds", "trees"):
        draw(root / "data" / name, test=4)
    (root / "rates.json").write_text(
        json.dumps({"rows": {"birds": {"full": {"chosen": {"lr": 0.01}}}}}), "utf-8"
    )
    rates = [f"--rates={root / 'rates.json'}", f"--data={root / 'data'}"]
    compare.main([*WORDS, *rates, f"--out={root / 'made'}"])
    words = ["--runs", str(root / "made"), "--few", str(root / "made")]
    sparsity.main([*words, "--out", str(root / "out")])
    return root


def read(path):
    return json.loads(path.read_text("utf-8"))


def models(root):
    return tuned.kept(sparsity.cells.read([root / "made"]))


def test_the_sum_of_changes_is_tested_with_each_head(made):
    """By the weights themselves: W0 + (A - W0) + (B - W0), and A's or B's head."""
    one, other = models(made)
    base, a, b = (dict(tuned.variables_of(model, nnx.Param))
                  for model in (one.base, one.model(), other.model()))  # fmt: skip
    both = tuned.added(one.base, [one.model(), other.model()], head=other.model())
    for path, own in dict(tuned.variables_of(both, nnx.Param)).items():
        w0, wa, wb = (np.asarray(x[path][...]) for x in (base, a, b))
        head = path.startswith("head")
        np.testing.assert_allclose(own[...], wb if head else wa + wb - w0, atol=1e-6)
    result = read(made / "out/measured.json")["adding"]["Full | birds | 0 | trees"]
    images = [other.transform(other.task.test[i]["image"], None) for i in range(6)]
    guessed = np.asarray(both(jnp.stack(images)).argmax(-1))
    right = unpacked(result["trees"]["right"], 6)
    assert right.tolist() == (guessed == labels_of(other.task.test)).tolist()


def test_every_measure_is_taken_once_and_reported(made, monkeypatch, capsys):
    values = read(made / "out/measured.json")
    assert {name: len(own) for name, own in values.items()} == {
        "sizes": 2, "forgetting": 2, "adding": 1, "robustness": 2
    }  # fmt: skip
    assert len(values["robustness"]["Full | trees | 0"]) == len(KINDS) * len(SEVERITIES)
    forgot = values["forgetting"]["Full | birds | 0"]["trees"]
    assert forgot["tested"] == 8  # training images
    for name in ("forgetting", "adding", "robustness", "sizes"):
        monkeypatch.setattr(sparsity.keeping, name, None)
    words = ["--runs", str(made / "made"), "--out", str(made / "out")]
    sparsity.main(words)
    assert "Full" in capsys.readouterr().out
    report = read(made / "out/report.json")
    size = next((made / "made").glob("runs/birds*/full/seed0/full.delta*")).stat()
    assert report["sizes"]["Full"]["delta file"] == pytest.approx(size.st_size / 1e6)
    own = [one.cell.right.mean() for one in models(made)]
    assert report["corrupted"]["Full"]["clean"] == pytest.approx(100 * np.mean(own))


def test_other_test_images_are_refused(made, tmp_path):
    for name in ("birds", "trees"):
        draw(tmp_path / name, test=2)
    one, _ = tuned.kept(sparsity.cells.read([made / "made"]), tmp_path)
    with pytest.raises(ValueError, match=r"has 4 test images, .* was tested on 6"):
        _ = one.task


def test_without_a_model_nothing_is_measured(made, tmp_path):
    words = ["--runs", str(made / "made"), "--out", str(tmp_path / "out")]
    for more in (["--methods", "lora"], ["--seeds", "1"]):
        with pytest.raises(SystemExit, match=r"Of 0 finished seeds .* no model was"):
            sparsity.main([*words, *more])
    assert not (tmp_path / "out").exists()


def test_corrupted_images_are_tested_one_by_one(made):
    one, _ = models(made)
    model, transform = one.model(), one.transform
    source = Corrupted(one.task.test, transform, "blur", 5)
    images = [transform(source[i]["image"], None) for i in range(6)]
    guessed = np.asarray(model(jnp.stack(images)).argmax(-1))
    found = read(made / "out/measured.json")["robustness"][one.key]["blur 5"]
    expected = (guessed == labels_of(one.task.test)).tolist()
    assert unpacked(found["right"], found["tested"]).tolist() == expected


def test_few_images_are_among_more():
    source = Arrays(np.zeros((40, 1, 1, 1), np.uint8), np.arange(40) % 4)
    five, two = (few(source, count) for count in (5, 2))
    assert np.bincount(labels_of(five)).tolist() == [5] * 4
    numbered = Arrays(np.arange(40, dtype=np.uint8).reshape(-1, 1, 1, 1), source.labels)
    more, fewer = (few(numbered, n).images.ravel().tolist() for n in (5, 2))
    assert set(fewer) < set(more) and fewer == sorted(fewer)
    assert len(few(source, 99)) == 40 and len(two) == 8


def test_corruptions_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    grey = np.full((224, 224, 3), 128, np.uint8)
    noisy = corruptions.noise(grey, 1, rng).astype(float)
    assert noisy.std() == pytest.approx(0.08 * 255, rel=0.01)
    edge = np.zeros((56, 56, 1), np.uint8)
    edge[:, 28:] = 200
    flat = corruptions.contrast(edge, 3, rng)
    assert np.unique(flat).tolist() == [80, 120]  # 100 -+ 0.2 * 100
    soft = corruptions.blur(edge, 5, rng)[28, :, 0].astype(float)
    slope = np.diff(soft).max()  # of a Gaussian of 10 / 4 pixels
    assert slope == pytest.approx(200 / (2.5 * (2 * np.pi) ** 0.5), rel=0.1)
    pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=15)
    np.testing.assert_array_equal(
        corruptions.jpeg(pixels, 3, rng), np.asarray(Image.open(file))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_corrupted_alike_each_time_at_the_models_size(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8)
    source, transform = Arrays(pixels, np.arange(2)), Transform((14, 14))
    corrupted = Corrupted(source, transform, kind, 3)
    one, again = corrupted[1]["image"], corrupted[1]["image"]
    np.testing.assert_array_equal(one, again)
    assert one.shape == (14, 14, 3) and corrupted[1]["label"] == 1
    whole = dataclasses.replace(corrupted, kind="contrast", severity=1)
    assert len(whole) == 2


def test_changes_are_means_over_pairs_of_tasks():
    """Of two pairs: 50 points lost in one, none in the other."""
    before = {
        ("a", "b"): {0: np.array([1, 1, 1, 1])},
        ("b", "a"): {0: np.array([1, 0])},
    }
    after = {("a", "b"): {0: np.array([1, 0, 1, 0])}, ("b", "a"): {0: np.array([1, 0])}}
    found = sparsity_report._changes(before, after, "before", "after")
    assert (found["before"], found["after"]) == (75, 50)
    assert found["change"]["value"] == pytest.approx(-25)
    assert found["pairs"] == 2
