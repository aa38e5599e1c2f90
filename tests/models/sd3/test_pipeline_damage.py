"""Pipelines that are damaged or not whole: each ends in an error that names it."""

import json
import shutil

import pytest
from places import ASSETS

from snella_jax.files.errors import CheckpointError
from snella_jax.models import sd3

WHOLE = ASSETS / "sd3" / "pipeline"
WEIGHTS = [
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    *(f"text_encoder{end}/model.safetensors" for end in ("", "_2", "_3")),
]
MODELS = [name.split("/")[0] for name in WEIGHTS]
JSON = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{name}/config.json" for name in MODELS),
    "tokenizer/tokenizer.json",
    "tokenizer_3/tokenizer.json",
]
FOLDERS = [*MODELS, "scheduler", "tokenizer", "tokenizer_3"]
PAGE = b"<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(WHOLE, tmp_path / "damaged")


def refused(folder, name, message, error=CheckpointError, **options):
    """An error that has the folder's path, that of what is wrong in it, and why."""
    with pytest.raises(error, match=message) as raised:
        sd3.load(folder, **options)
    assert str(folder) in str(raised.value) and name in str(raised.value)


@pytest.mark.parametrize("file", JSON + WEIGHTS)
def test_a_web_page_in_a_files_place(folder, file):
    (folder / file).write_bytes(PAGE)
    refused(folder, file, "a web page: log in")


@pytest.mark.parametrize("file", JSON + WEIGHTS)
def test_half_a_file(folder, file):
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: len(data) // 2])
    refused(folder, file, "damaged")


@pytest.mark.parametrize("file", WEIGHTS)
def test_an_empty_file(folder, file):
    (folder / file).write_bytes(b"")
    refused(folder, file, "damaged")


@pytest.mark.parametrize("file", JSON + WEIGHTS)
def test_a_missing_file(folder, file):
    (folder / file).unlink()
    errors = CheckpointError, FileNotFoundError
    refused(folder, file.split("/")[0], "there is (no|a)|has (no|neither)", errors)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_missing_folder(folder, name):
    shutil.rmtree(folder / name)
    refused(folder, f"there is no {name}/", "its download is not complete")


def test_all_that_is_missing_is_listed(folder):
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "text_encoder_3")
    refused(folder, "there is no vae/config.json", "no text_encoder_3/config.json")


def never(*arguments, **options):
    raise AssertionError("it was loaded")


def test_a_dtype_that_t5_cannot_have_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(sd3.mmdit, "load", never)
    with pytest.raises(ValueError, match="dtype=float16: expected float32 or bfloat16"):
        sd3.load(WHOLE, dtype="float16")


@pytest.mark.parametrize("left", ["transformer", "vae"])
def test_text_encoders_are_loaded_last(folder, left, monkeypatch):
    """They take longest; what is no Stable Diffusion 3 is refused before."""
    monkeypatch.setattr(sd3.clip, "load", never)
    changed(folder / left / "config.json", quantization_config={"bits": 4})
    refused(folder, left, "quantization_config")


def changed(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields), "utf-8")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("_class_name", "StableDiffusionXLPipeline", "expected 'StableDiffusion3Pip"),
        ("transformer", ["diffusers", "FluxTransformer2DModel"], "='FluxTransformer2D"),
        ("vae", ["diffusers", "AutoencoderTiny"], "vae='AutoencoderTiny'"),
        ("scheduler", ["diffusers", "DDIMScheduler"], "scheduler='DDIMScheduler'"),
        (
            "text_encoder_2",
            ["transformers", "CLIPTextModel"],
            "expected 'CLIPTextModelW",
        ),
        ("text_encoder_3", [None, None], "t5=False goes without T5"),
        ("tokenizer", "CLIPTokenizer", "tokenizer=None: expected 'CLIPTokenizer'"),
    ],
)
def test_the_index_names_other_classes(folder, field, value, message):
    changed(folder / "model_index.json", **{field: value})
    refused(folder, "", message)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_class_name", "FlowMatchHeunDiscreteScheduler"),
        ("num_train_timesteps", 500),
        ("use_dynamic_shifting", True),
        ("invert_sigmas", True),
        ("shift_terminal", 0.1),
        ("use_karras_sigmas", True),
        ("stochastic_sampling", True),
        ("shift", 0),
        ("shift", None),
        ("shift", "3"),
    ],
)
def test_another_scheduler(folder, field, value):
    changed(folder / "scheduler" / "scheduler_config.json", **{field: value})
    refused(folder, "scheduler_config.json", field)


def test_what_is_no_pipeline(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no pipeline at"):
        sd3.load(tmp_path / "none")
    refused(tmp_path, "", r"no model_index.json: expected a folder of a diffusers")
    refused(WHOLE / "vae", "", r"no model_index.json: expected a folder of a diffusers")
    refused(WHOLE / WEIGHTS[1], "", "holds no model.diffusion_model")
    with pytest.raises(ValueError, match="text_on='cpu': expected"):
        sd3.load(WHOLE, text_on="cpu")


def test_a_host_that_jax_was_told_not_to_use(monkeypatch):
    def unknown(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr("jax.local_devices", unknown)
    monkeypatch.setattr(sd3.mmdit, "load", never)
    with pytest.raises(ValueError, match="JAX_PLATFORMS=cuda,cpu"):
        sd3.load(WHOLE, text_on="host")
