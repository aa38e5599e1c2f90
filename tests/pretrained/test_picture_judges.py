"""CLIP and DINOv2 as judges: tiny ones, by their own calls; missing weights by name."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from compiled import called
from flax import nnx
from PIL import Image
from places import ROOT

from experiments import dreambooth
from experiments.config.dreambooth import DREAMBOOTH, DreamboothConfig
from experiments.data.transforms import NORMALISATIONS
from experiments.pretrained import dinov2_saliency, picture_judges, sd3_models
from experiments.pretrained.picture_judges import ClipAndDino
from snella_jax.models import vit
from snella_jax.models.sd3 import clip

DINO = ROOT / "tests/assets/vit/dinov2"
SIZES = {"width": 16, "depth": 1, "heads": 2, "projection": 6}
RNG = np.random.default_rng


@pytest.fixture
def towers(monkeypatch):
    """Tiny towers in the place of a CLIP's files, and a tokenizer of letters."""
    image = clip.ClipImage(
        clip.ClipImageConfig(**SIZES, patch_size=7, image_size=14), rngs=nnx.Rngs(0)
    )
    text = clip.ClipText(
        clip.ClipTextConfig(**SIZES, vocab_size=130, positions=9), rngs=nnx.Rngs(1)
    )

    def padded(texts, length):
        rows = np.full((len(texts), length), 129, np.int32)
        for row, own in zip(rows, texts, strict=True):
            row[: len(own)] = [ord(letter) for letter in own]
        return rows

    monkeypatch.setattr(clip, "load_image", lambda path: image)
    monkeypatch.setattr(clip, "load", lambda path: text)
    found = SimpleNamespace(padded=padded)
    monkeypatch.setattr(picture_judges, "clip_tokenizer", lambda path: found)
    return image, text, padded


def cosine(one, other):
    return (one * other).sum(-1) / np.linalg.norm(one) / np.linalg.norm(other)


def test_features_are_the_networks_own_at_their_own_sizes(
    towers, monkeypatch, tmp_path
):
    """And the fit is CLIP's cosine. Batches of two, the last of which is filled."""
    image, text, padded = towers
    monkeypatch.setattr(picture_judges, "BATCH", 2)
    monkeypatch.setattr(picture_judges, "DINO_SIDE", 28)  # of 32
    own = vit.load(DINO, image_size=28)
    pictures = RNG(0).integers(0, 255, (3, 40, 40, 3), np.uint8)
    judges = ClipAndDino(tmp_path, DINO)
    found = judges.features(pictures)
    small, middle = [], []
    for pixels in pictures:
        picture = Image.fromarray(pixels)
        small.append(np.float32(picture.resize((14, 14), Image.BICUBIC)) / 255)
        whole = np.float32(picture.resize((32, 32), Image.BICUBIC)) / 255
        middle.append(whole[2:30, 2:30])
    mean, std = map(np.float32, (image.config.pixel_mean, image.config.pixel_std))
    expected = called(image, (np.stack(small) - mean) / std)
    np.testing.assert_allclose(found.likeness, expected, atol=1e-4)
    mean, std = map(np.float32, NORMALISATIONS["imagenet"])
    expected = called(own, (np.stack(middle) - mean) / std)  # which has no head
    np.testing.assert_allclose(found.variety, expected, atol=1e-4)
    prompts = ["a dog", "cat", "a dog"]
    fits = judges.fits(found, prompts)
    for row, prompt in enumerate(prompts):
        _, pooled = called(text, padded([prompt], 9))
        expected = cosine(found.likeness[row], np.asarray(pooled[0]))
        assert fits[row] == pytest.approx(expected, abs=1e-5)


def test_missing_weights_are_named_with_the_place_to_get_them(tmp_path, monkeypatch):
    """All of them at once, before anything is loaded."""
    photograph = tmp_path / "dreambooth" / "dog" / "00.png"
    photograph.parent.mkdir(parents=True)
    Image.new("RGB", (20, 16)).save(photograph)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        dreambooth.main(["--config=sd3", "--subject=dog", "--data_dir=."])
    for part in (
        "--model stable-diffusion-3-medium-diffusers",
        "https://huggingface.co/stabilityai/stable-diffusion-3-medium",
        "text_encoder_3/",
        "sd3_medium_incl_clips.safetensors",
        "gated: log in",
        "--clip_model clip-vit-base-patch32: get https://huggingface.co/openai/",
        "--dino_model dinov2-base: get https://huggingface.co/facebook/dinov2-base",
    ):
        assert part in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"dreambooth"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", "bfloat16"), ("param_dtype", "bfloat16"), ("remat", "blocks"),
     ("encode_on", "host")],
)  # fmt: skip
def test_the_toy_has_no_such_options(name, value):
    config = dataclasses.replace(DREAMBOOTH["toy"].config, **{name: value})
    message = "expected --dtype float32, .* --remat none, .* --encode_on device"
    with pytest.raises(ValueError, match=message):
        sd3_models.load(config)


def test_the_toys_judges_are_read_from_the_probe_and_the_vit(tmp_path, monkeypatch):
    vit_file = tmp_path / "vit_s_focus.onnx"
    monkeypatch.setattr(dinov2_saliency, "path", lambda: vit_file)
    probe = ROOT / "experiments/pretrained/emoji_probe.safetensors"
    assert picture_judges.files(SimpleNamespace(model="toy")) == [probe, vit_file]
    assert probe.exists()


def test_files_of_a_model_are_all_that_a_run_reads(tmp_path):
    for name in ("transformer", "vae", "text_encoder_3", "tokenizer_3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"")
        (tmp_path / name / "config.json").write_bytes(b"")
    (tmp_path / "tokenizer_3" / "spiece.model").write_bytes(b"")
    config = dataclasses.replace(DreamboothConfig(), model=str(tmp_path), t5=False)
    found = [file.relative_to(tmp_path).parts[0] for file in sd3_models.files(config)]
    assert found == ["transformer"] * 2 + ["vae"] * 2
    config = dataclasses.replace(config, t5=True)
    assert len(sd3_models.files(config)) == 9
    single = tmp_path / "sd3.safetensors"
    single.write_bytes(b"")
    found = tmp_path / "tokenizer_3" / "spiece.model"
    config = dataclasses.replace(config, model=str(single), t5_tokenizer=found)
    assert sd3_models.files(config) == [single, found]
