"""The experiments: command line, data, methods, weights, and a short real run."""

import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pictures
import pytest
from flax import nnx
from PIL import Image
from places import ASSETS
from safetensors.numpy import load_file

import snella_jax as snella
from experiments import vtab
from experiments.config import command_line, presets, run_config
from experiments.config.images import ImageConfig
from experiments.methods import linear_probe, lora
from experiments.pretrained import base_models, small_vit
from experiments.pretrained.pretrain import augment
from experiments.tasks import catalogue, digits
from experiments.training import evaluation, sharding
from experiments.training.classification import Classification
from snella_jax import models
from snella_jax.models.vit import ViT, ViTConfig


def parse(*argv):
    return command_line.parse("vtab", presets.VTAB, list(argv), "vtab1k")


def test_a_preset_and_overrides_of_single_fields():
    name, config = parse(
        "--config", "quickstart", "--epochs", "7", "--snella.rank", "4"
    )
    assert name == "quickstart"
    assert (
        config.epochs,
        config.settings["snella"].rank,
        config.settings["lora"].rank,
    ) == (7, 4, 8)
    assert config.methods == ("linear", "lora", "snella")


def test_a_runs_own_config_reads_back(tmp_path):
    changed = ("--snella.gate", "soft", "--seed", "3", "--skip_corrupt", "--task=-x")
    changed += ("--snella.no_learn_piece_coeff", "--grid.densities", "--mesh", "data=2")
    _, config = parse("--config", "quickstart", *changed)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(run_config.as_dict(config)), "utf-8")
    name, again = parse("--config", str(path))
    assert (name, again) == ("config", config)
    assert parse("--config", str(path), "--seed", "4")[1].seed == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config is missing: name a preset, such as quickstart"),
        (
            ["--config", "quikstart"],
            "no preset or file is called 'quikstart'; did you mean quickstart?",
        ),
        (
            ["--config", "quickstart", "--epoch", "3"],
            "no option is called '--epoch'; did you mean --epochs",
        ),
        (["--config", "quickstart", "--snella.rank", "5"], "rank=5 is not a positive"),
        (
            ["--config", "quickstart", "--snella.dropout", "0.1"],
            'needs path="parallel"',
        ),
        (
            ["--config", "quickstart", "--epochs", "2"],
            "warmup_epochs=2: expected fewer",
        ),
        (
            ["--config", "quickstart", "--epochs", "1", "--warmup-epochs", "0"],
            "expected at least 2",
        ),
        (["--config", "quickstart", "--batch", "0"], "batch=0: expected at least 1"),
        (
            ["--config", "quickstart", "--accumulate", "3"],
            "expected a divisor of batch",
        ),
        (["--config", "quickstart", "--ema", "1"], "ema=1.0: expected"),
        (["--config", "quickstart", "--mixup", "-1"], "mixup=-1.0"),
        (["--config", "quickstart", "--no_decay", "("], "does not compile"),
        (["--config", "quickstart", "--distributed"], "expected --out, the same for"),
        (
            [
                "--config",
                "quickstart",
                "--snella.kernel",
                "rbf",
                "--snella.temperature",
            ],
            "kernel=rbf has no temperature",
        ),
        (
            ["--config", "quickstart", "--snella.gate", "none"],
            "gate='none' lets every weight move",
        ),
        (
            ["--config", "quickstart", "--search", "--grid.lr_factors", "0"],
            "expected positive",
        ),
        (
            ["--config", "quickstart", "--search", "--grid.densities", "30"],
            "target_density=30.0: expected 0 to 1",
        ),
        (
            ["--config", "quickstart", "--search", "--protocol", "released"],
            "would follow the test split",
        ),
    ],
)
def test_bad_command_lines_list_what_is_valid(argv, message):
    with pytest.raises(SystemExit) as error:
        parse(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--grid.densities", "0.5"], "--grid.densities: a search alone reads it."),
        (["--targets", "nothing"], "targets='nothing' matches no layer"),
        (["--batch", "801"], "expected 1 to 800 (training images)"),
        (["--task", "nothing"], "no task, folder or CSV file is called 'nothing'"),
        (["--model", "nothing.npz"], "There is no checkpoint at nothing.npz"),
        (["--image-size", "56"], "vit_fashion_mnist takes 28 x 28 alone"),
        (["--trainable", "nope"], "trainable='nope' matches nothing"),
        (["--drop-path", "1.5"], "drop_path=1.5"),
        (["--lora.rank", "0"], "lora.rank=0"),
        (["--lora.lr", "nan"], "lora.lr=nan"),
        (["--snella.beta1", "2"], "beta1=2.0"),
        (["--linear.strengths", "-1"], "expected positive numbers"),
        (["--methods", "snella", "snella"], "expected each once"),
        (["--seed", "-1"], "seed=-1"),
        (["--mesh", "data=3"], "3 devices and accumulate=1 do not divide it"),
        (["--mesh", "data=8"], "takes 8 devices: there are 4"),
        (["--mesh", "rows=2"], "expected data=N, fsdp=N, tensor=N or several"),
        (["--no_decay", "hed"], "matches nothing that decays: blocks/attn/key/"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_written(tmp_path, argv, message):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as error:
        vtab.main(["--config", "quickstart", "--out", str(out), *argv])
    assert message in str(error.value)
    assert not out.exists()


def test_a_value_of_no_field_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--config", "quickstart", "--snella.gate", "sfot")
    assert "soft" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds no JSON object"),
        ('{"snella": {"rnk": 4}}', "snella.rnk (did you mean snella.rank?)"),
    ],
)
def test_bad_config_files_say_why(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text, "utf-8")
    with pytest.raises(SystemExit) as error:
        parse("--config", str(path))
    assert message in str(error.value)


def test_help_lists_presets_and_fields(capsys):
    with pytest.raises(SystemExit) as error:
        parse("--help")
    assert error.value.code == 0
    shown = capsys.readouterr().out
    assert "quickstart (digits, a small ViT" in " ".join(shown.split())
    for field in ("--epochs", "--snella.lr", ".target_density", "--out", "--seed"):
        assert field in shown


def test_digits_are_split_800_200_797_without_overlap_and_always_alike():
    task, again = digits.load(), digits.load()
    assert [len(s) for s in (task.train, task.validation, task.test)] == [800, 200, 797]
    for split in ("train", "validation", "test"):
        ours, theirs = getattr(task, split), getattr(again, split)
        np.testing.assert_array_equal(ours.images, theirs.images)
        assert set(ours.labels) == set(range(10))
    seen = [s.tobytes() for part in (task.train, task.validation, task.test)
            for s in part.images]  # fmt: skip
    assert len(set(seen)) == 1797  # no two digits are equal, so none is in two splits
    other = digits.load(split_seed=1)
    assert (other.train.labels != task.train.labels).any()


def test_augmentation_flips_and_shifts_whole_images():
    """Each result is the image or its mirror, moved by at most 2 pixels each way."""
    images = np.random.default_rng(0).integers(1, 256, (50, 6, 6, 1), np.uint8)
    results = augment(np.random.default_rng(1), images)
    moves = set()
    for image, result in zip(images, results, strict=True):
        candidates = {
            (flip, dy, dx): np.pad(
                image[:, ::-1] if flip else image, ((2, 2), (2, 2), (0, 0))
            )[dy : dy + 6, dx : dx + 6]
            for flip in (False, True) for dy in range(5) for dx in range(5)
        }  # fmt: skip
        found = [k for k, v in candidates.items() if np.array_equal(v, result)]
        assert len(found) == 1
        moves.add(found[0])
    assert len(moves) > 20


def test_the_committed_weights_fit_the_model_and_carry_knowledge():
    """A probe on the features beats one on the same network with random weights."""
    how = digits.load(), small_vit.TRANSFORM, sharding.make("data=1"), (1.0,)
    pretrained = linear_probe.train(small_vit.load(0), *how)
    random = linear_probe.train(ViT(small_vit.SMALL, rngs=nnx.Rngs(0)), *how)
    assert pretrained.trainable == 970
    assert pretrained.test_accuracy > max(0.9, random.test_accuracy + 0.02)
    size = sum(v.size for v in jax.tree.leaves(nnx.state(small_vit.load(0))))
    assert size <= 750_000 and small_vit.WEIGHTS.stat().st_size < 3_000_000


@pytest.mark.parametrize(
    "extensions, kept", [(0, 0.1), (1, 0.01), (2, 1e-3), (5, 1e-4)]
)
def test_a_probe_goes_on_beyond_its_strengths(extensions, kept, monkeypatch):
    """To a peak at 1e-4, and no further; of equals it keeps the stronger."""
    fits = []

    def fit(strength, features, labels):
        fits.append(strength)
        score = -round(abs(np.log10(strength) + 4), 3)
        head = SimpleNamespace(C=strength, coef_=labels, intercept_=labels)
        head.score, head.predict = lambda *_: score, lambda _: labels
        return linear_probe._Fit(head, 1, 1.0)

    monkeypatch.setattr(linear_probe, "_fitted", fit)
    monkeypatch.setattr(
        linear_probe.evaluation, "features", lambda model, source, *_: source
    )
    part = np.zeros((4, 3)), np.arange(4)
    task = SimpleNamespace(train=part, validation=part, test=part)
    how: list[Any] = [None, task, None, None, (1.0, 0.1), extensions]
    probe = linear_probe.train(*how)
    assert probe.strength == pytest.approx(kept)
    assert fits == pytest.approx([10.0**-n for n in range(min(2 + extensions, 6))])
    how[4:] = [(0.01, 1e-6), 0]
    assert linear_probe.train(*how).strength == 1e-6


SMALL = ViTConfig(
    width=8, depth=2, heads=2, patch_size=4, image_size=8, channels=1, num_classes=3
)


def test_weights_round_trip_and_refuse_what_does_not_fit(tmp_path):
    path = tmp_path / "new" / "w.safetensors"
    model, other = (ViT(SMALL, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    small_vit.save(model, path)
    small_vit.fill(other, path)
    for a, b in zip(
        *(jax.tree.leaves(nnx.state(m)) for m in (model, other)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    wide = ViTConfig(**{**vars(SMALL), "num_classes": 7, "layer_scale": 0.1})
    with pytest.raises(
        ValueError, match=r"no tensor for blocks/scale1(.|\n)*head/kernel"
    ):
        small_vit.fill(ViT(wide, rngs=nnx.Rngs(0)), path)
    fresh = ViT(ViTConfig(**{**vars(SMALL), "num_classes": 7}), rngs=nnx.Rngs(1))
    small_vit.fill(fresh, path, skip="head")
    np.testing.assert_array_equal(fresh.pos_embed[...], model.pos_embed[...])
    assert list(path.parent.iterdir()) == [path]


def test_lora_is_the_linear_kernel_without_a_threshold():
    """Started at the base; after moving, equal to SNELLA's linear kernel, gate hard."""
    base = ViT(SMALL, rngs=nnx.Rngs(0))
    base.head.kernel[...] = jax.random.normal(jax.random.key(4), (8, 3))
    targets = r"blocks/mlp/fc."
    ours = lora.branched(base, targets, "head", 4, nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    np.testing.assert_array_equal(ours(x), base(x))
    config = snella.SnellaConfig(
        rank=4, kernel="linear", gate="hard", target_density=1.0, targets=targets
    )
    theirs = snella.adapt(base, config, rngs=nnx.Rngs(2))
    for name in ("fc1", "fc2"):
        mine = getattr(ours.blocks.mlp, name).lora
        its = getattr(theirs.blocks.mlp, name).adapter
        mine.b[...] = jax.random.normal(jax.random.key(3), mine.b.shape)
        its.a[...], its.b[...] = mine.a[...][:, None], mine.b[...][:, None]
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lora.merge(ours)(x), ours(x), rtol=1e-4, atol=1e-5)
    kept = lora.as_adapters(ours)
    np.testing.assert_allclose(kept(x), ours(x), rtol=1e-4, atol=1e-5)
    assert kept.blocks.mlp.fc1.adapter.a[...].any()
    trains = {
        "/".join(path) for path, _ in nnx.to_flat_state(nnx.state(ours, nnx.Param))
    }
    branches = {f"blocks/mlp/{fc}/lora/{ab}" for fc in ("fc1", "fc2") for ab in "ab"}
    assert trains == branches | {"head/kernel", "head/bias"}
    with pytest.raises(ValueError, match=r"patch_embed: expected nnx\.Linear"):
        lora.branched(base, "patch_embed", "head", 4, nnx.Rngs(1))


def run(out, *argv):
    start = ["--config", "quickstart", "--out", str(out), "--mesh", "data=1"]
    return vtab.main([*start, *argv])


def test_a_short_run_writes_its_folder_and_repeats_exactly(tmp_path):
    short = pictures.short(
        tmp_path,
        *("--epochs=2", "--warmup-epochs=1", "--methods", "snella"),
        f"--targets={ImageConfig.targets}",
        each=16,
    )
    summary = vtab.main([*short, f"--out={tmp_path / 'a'}"])
    again = vtab.main([*short, f"--out={tmp_path / 'b'}"])
    lines, others = (
        [
            json.loads(x)
            for x in (tmp_path / run / "metrics.jsonl")
            .read_text("utf-8")
            .split("\n")[:-1]
        ]
        for run in "ab"
    )
    for row in (*lines, *others):
        row.pop("seconds_per_step")
    assert lines == others
    assert [row["epoch"] for row in lines] == [1, 2]
    weight = 1 / 3456  # budgets are whole weights
    assert [row["density"] for row in lines] == [1.0, pytest.approx(0.3, abs=weight)]
    assert len(lines[1]["importance"]) == len(lines[1]["budget"]) == 18
    assert json.loads((tmp_path / "a/summary.json").read_text("utf-8")) == summary
    assert summary["task"] == "pets"
    result = summary["methods"]["snella"]
    assert set(result) >= {
        "test_accuracy", "val_accuracy", "trainable", "seconds_per_step", "density",
    }  # fmt: skip
    budget = sum(lines[1]["budget"].values())  # a tiny update may round to nothing
    assert 0.999 * budget < result["weights_moved"] <= budget
    assert result["test_accuracy"] == again["methods"]["snella"]["test_accuracy"] > 0.9
    assert (tmp_path / "a/figures/allocation.png").stat().st_size > 10_000
    one, other = (
        load_file(tmp_path / run / "adapters/snella/adapter_model.safetensors")
        for run in "ab"
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    base = models.load(pictures.CLASSIFIER, num_classes=2, image_size=24)
    model = snella.load(base, tmp_path / "a/adapters/snella")
    test = catalogue.load(str(tmp_path / "pets")).test
    config = ImageConfig(model=str(pictures.CLASSIFIER), image_size=24)
    _, transform = base_models.transforms(config, base)
    alone = sharding.make("data=1")
    found = evaluation.evaluate(model, test, transform, alone, Classification())
    assert found.metrics["accuracy"] == result["test_accuracy"]
    assert json.loads((tmp_path / "a/config.json").read_text("utf-8"))["epochs"] == 2
    with pytest.raises(SystemExit, match="is not empty: name another folder"):
        vtab.main([*short, f"--out={tmp_path / 'a'}"])


def test_ones_own_images_and_checkpoint(tmp_path):
    """A CSV file of pictures, and a folder that Hugging Face's ViT was saved to."""
    lines, rng = ["path,label,split"], np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8), ("test", 8)):
        for i in range(count):
            red = np.zeros((30, 40, 3), np.uint8)
            red[..., i % 3] = rng.integers(100, 256, (30, 40))
            Image.fromarray(red).save(tmp_path / f"{part}{i}.png")
            lines.append(f"{part}{i}.png,{('red', 'green', 'blue')[i % 3]},{part}")
    (tmp_path / "colours.csv").write_text("\n".join(lines), "utf-8")
    checkpoint = ASSETS / "vit" / "classifier"
    summary = run(
        tmp_path / "run",
        *("--task", str(tmp_path / "colours.csv"), "--model", str(checkpoint)),
        *("--image-size", "24", "--batch", "8", "--epochs", "8", "--snella.rank", "4"),
        pictures.TARGETS,
        *("--methods", "linear", "lora", "snella"),
    )
    assert summary["task"] == "colours"
    assert summary["methods"]["linear"]["test_accuracy"] == 1
    made = tmp_path / "run" / "adapters"
    assert sorted(path.name for path in made.iterdir()) == ["lora", "snella"]
    base = models.load(checkpoint, num_classes=3, image_size=24)
    tuned = snella.load_peft(base, made / "lora")
    assert tuned.head.bias.any() and tuned.blocks.mlp.fc1.adapter.b[...].any()
    assert snella.load(base, made / "snella").head.bias.any()
    assert summary["methods"]["snella"]["test_accuracy"] > 0.6
