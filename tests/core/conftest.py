"""Fixtures of the tests of `core`."""

import jax
import pytest

from snella_jax import threshold


@pytest.fixture(params=["cpu", "accelerator"])
def searched(request, monkeypatch):
    """The threshold as each kind of device searches for it."""
    if request.param == "accelerator":
        monkeypatch.setattr(
            jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args)
        )
    return jax.jit(lambda delta, budget: threshold(delta, budget))
