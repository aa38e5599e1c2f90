"""The MMDiT and diffusers' `SD3Transformer2DModel`, on tiny random models."""

import jax.numpy as jnp
import numpy as np
import pytest
from mmdit_files import INPUTS, SIZES, close, single_of
from safetensors.numpy import save_file

from snella_jax import models
from snella_jax.models.sd3 import mmdit

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def theirs():
    import torch
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(**SIZES).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def output(model):
    import torch

    latents, timestep, context, pooled = map(torch.tensor, INPUTS)
    with torch.no_grad():
        found = model(
            latents.permute(0, 3, 1, 2), context, pooled, timestep, return_dict=False
        )
    return found[0].permute(0, 2, 3, 1).numpy()


def test_a_folder_and_a_single_file_give_the_velocities_of_diffusers(theirs, tmp_path):
    expected = output(theirs)
    theirs.save_pretrained(tmp_path / "transformer")
    own = mmdit.load(tmp_path / "transformer")
    close(own(*map(jnp.asarray, INPUTS)), expected)
    close(own.positions[...].reshape(1, -1, 32), theirs.pos_embed.pos_embed.numpy())
    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    prefixed = {f"model.diffusion_model.{n}": t for n, t in single_of(tensors).items()}
    save_file(prefixed, tmp_path / "sd3.safetensors")
    single = models.load(tmp_path / "sd3.safetensors", heads=4, stacked=False)
    close(single(*map(jnp.asarray, INPUTS)), expected)


def test_diffusers_loads_what_is_written(theirs, tmp_path):
    from diffusers import SD3Transformer2DModel

    theirs.save_pretrained(tmp_path / "theirs")
    model = mmdit.load(tmp_path / "theirs")
    for shards, size in (("one", 10**9), ("several", 40_000)):
        models.export(model, tmp_path / shards, max_shard_bytes=size)
        again = SD3Transformer2DModel.from_pretrained(tmp_path / shards)
        np.testing.assert_array_equal(output(again), output(theirs))
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1


def test_a_new_models_positions_are_those_of_diffusers(theirs):
    """Its own table, of a third of a patch's number: 64 patches over 192 places."""
    from diffusers.models.embeddings import PatchEmbed

    table = PatchEmbed(
        height=8, width=8, patch_size=2, embed_dim=32, pos_embed_max_size=12
    ).pos_embed
    own = mmdit.model.table(12, 32, jnp.float32)
    close(own.reshape(1, -1, 32), table.numpy())
