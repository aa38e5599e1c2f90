"""What a failed download leaves in a file's place is named as that."""

import pytest

from snella_jax.files.errors import CheckpointError
from snella_jax.files.readers import read_json
from snella_jax.models.checkpoints.read import read

LEFT = {
    "a page": (b"<!DOCTYPE html>\n<html>", "a web page: log in"),
    "a page without a type": (b"\n <HTML lang='en'>", "a web page: log in"),
    "a refusal": (
        b"Access to model stabilityai/stable-diffusion-3-medium is restricted.",
        "a refusal of Hugging Face: log in",
    ),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1",
        "a pointer of Git LFS: run `git",
    ),
}


@pytest.mark.parametrize("name", ["a.safetensors", "a.json", "a.npz", "a.ckpt"])
@pytest.mark.parametrize("left", LEFT)
def test_what_a_failed_download_leaves(left, name, tmp_path):
    content, message = LEFT[left]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: it is {message}"):
        (read_json if name.endswith("json") else read)(path)
