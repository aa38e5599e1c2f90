"""A run on a concept by Stable Diffusion 3 itself: a tiny pipeline in diffusers' files.

Other tests of these runs have a model of pixels, without an autoencoder.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sd3
from places import ASSETS
from rich.console import Console

from experiments.config.dreambooth import DREAMBOOTH
from experiments.pretrained import picture_judges
from experiments.runs import dreambooth as runs
from experiments.training import pictures
from snella_jax.models import sd3

pytestmark = pytest.mark.slow  # compiles three text encoders, twice
WHOLE = ASSETS / "sd3" / "pipeline"


def test_latents_and_pictures_are_those_of_its_components(tmp_path, monkeypatch):
    for name, value in (("load", tiny_sd3.Colours()), ("files", [])):
        monkeypatch.setattr(picture_judges, name, lambda *_, value=value: value)
    config = dataclasses.replace(
        DREAMBOOTH["sd3"].config,
        model=str(WHOLE),
        subject=str(tiny_sd3.photographs(tmp_path / "mug", 2)),
        class_name="mug",
        size=16,
        sampler_steps=2,
        t5_length=24,
        encode_on="host",
        dtype="float32",
        param_dtype="float32",
        out=tmp_path / "run",
    )
    run = runs.prepared("sd3", config, Console(quiet=True))

    autoencoder = sd3.vae.load(WHOLE / "vae")
    images = run.task.concept.photographs.images
    mean, logvar = autoencoder.encode(np.float32(images) / 127.5 - 1)
    np.testing.assert_allclose(run.moments["mean"], mean, atol=1e-4)
    np.testing.assert_allclose(run.moments["logvar"], logvar, atol=1e-4)
    found = run.objective.latents(run.moments, None)
    np.testing.assert_allclose(found, (mean - 0.25) * 1.5, atol=2e-4)  # of its config
    assert run.objective.noise_shift == 3.0

    how = dataclasses.replace(config.drawing, each=2, batch=2)
    texts = run.prompts.trained
    run._draw(tmp_path / "drawn", run._pipeline(run.base), texts, how, "")
    whole = sd3.load(WHOLE, t5_length=24)
    keys = [pictures.key_of(0, "a photo of sks mug", number) for number in range(2)]
    options = {"steps": 2, "guidance": 7.0, "size": 16, "key": jnp.stack(keys)}
    expected = np.int32(whole("a photo of sks mug", "", **options))
    (drawn,) = np.int32(pictures.read(tmp_path / "drawn", 1, 2))
    assert abs(drawn - expected).max() <= 1 < abs(drawn[0] - drawn[1]).max()
