"""Meshes: what their text means, and what it cannot be."""

import jax
import pytest

from experiments.training import sharding


def test_what_no_mesh_can_be():
    assert sharding.make().shape == {"data": 4, "model": 1}
    assert sharding.make("model=2").shape == {"data": 1, "model": 2}
    assert sharding.describe(sharding.make("data=2")) == "2 x cpu (data=2, model=1)"
    assert sharding.describe(sharding.make("data=1")) == "cpu"
    for text in ("data", "data=", "data=0", "data=x", "rows=1", "data=2;model=2"):
        with pytest.raises(ValueError, match="expected data=N, model=N"):
            sharding.make(text)
    with pytest.raises(ValueError, match="takes 6 devices: there are 4"):
        sharding.make("data=3,model=2")


@pytest.mark.parametrize("text", ["data=2", "model=4", "data=1,model=4"])
def test_every_process_has_devices_and_images_of_its_own(text, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="2 processes with 4 devices need all of"):
        sharding.make(text)
    assert sharding.make("data=2,model=2").size == sharding.make().size == 4
