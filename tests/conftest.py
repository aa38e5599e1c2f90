"""Four fake CPU devices and one cache of compiled programs for every test.

And a fixture that switches float64 on.
"""

import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
).strip()

# Processes that a test starts, and other workers, load what one of them compiled.
CACHE = "" if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp()
if CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

collect_ignore = ["data"]  # scripts there need more than the tests do


@pytest.fixture
def x64():
    """float64 exists inside the test that asks for this."""
    with jax.enable_x64(True):
        yield


def pytest_unconfigure():
    """The process that made the cache removes it, once its workers are done."""
    if CACHE:
        shutil.rmtree(CACHE, ignore_errors=True)
