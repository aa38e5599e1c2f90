"""Four fake CPU devices for every test, and a fixture that switches float64 on."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
).strip()

import jax
import pytest

collect_ignore = ["data"]  # scripts there need more than the tests do


@pytest.fixture
def x64():
    """float64 exists inside the test that asks for this."""
    with jax.enable_x64(True):
        yield
