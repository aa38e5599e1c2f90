"""Four fake CPU devices and one cache of compiled programs for every test.

And a fixture that switches float64 on.
"""

import gc
import os
import shutil
import sys
import tempfile
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A worker for each core is enough: more threads fight over them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# XLA's threads for the CPU: at one a core those of four devices, which wait in a
# collective, leave none for the collective that others wait in, and it aborts.
os.environ.setdefault("NPROC", "16")
# Each may compile for a TPU: libtpu's lock is for those that run on one.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Tests compile more than they compute: without LLVM's optimisations and MLIR's fusions
# a training step compiles in a third of the time. Fused multiply-adds round a weight
# that is recomputed otherwise, and at the threshold it changes sides in the backward
# pass: AVX has none. A program is one LLVM module: up to 32, in threads, cost more.
# (An unknown flag aborts a process: jaxlib 0.10 knows these, 0.12 the last, libtpu
# none.) Workers inherit the flags.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 "
    + (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_max_isa=AVX "
        * version("jaxlib").startswith("0.10.")
        + "--xla_cpu_parallel_codegen_split_count=1 "
        * version("jaxlib").startswith(("0.10.", "0.11.", "0.12."))
    )
    * ("tpu_compile" not in sys.argv)
) * ("PYTEST_XDIST_WORKER" not in os.environ) + os.environ.get("XLA_FLAGS", "")

import jax
import pytest

# Tracing makes many objects that live on; to walk them after every 700 takes a tenth of
# the time.
gc.set_threshold(100_000, 20, 20)
# Scripts and an oracle that need more than the tests do.
collect_ignore = ["assets", "helpers/mobile_sam_torch.py"]
CACHE = "jax_compilation_cache_dir"
CACHED = {  # everything: most programs are operations of a few milliseconds
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def pytest_configure(config):
    """Workers and the processes that tests start load what one of them compiled.

    Not a program for a device that is not there, which the cache takes but cannot load.
    """
    if config.option.markexpr in ("tpu_compile", "cuda_compile"):
        os.environ.pop(CACHE.upper(), None)
        jax.config.update(CACHE, None)
        return
    folder = os.environ.get(CACHE.upper())
    if folder is None:
        folder = config.compiled = tempfile.mkdtemp()
    for name, value in {CACHE: folder, **CACHED}.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


def pytest_ignore_collect(collection_path, config):
    """Files without the one marker that was asked for are not imported.

    So a file spells the markers of its tests out: `mark.NAME`.
    """
    marker = config.option.markexpr
    if collection_path.suffix == ".py" and marker.isidentifier():
        return f"mark.{marker}" not in collection_path.read_text("utf-8") or None


def pytest_collection_finish(session):
    """What was imported lives on: nothing of it is walked again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    """The process that made the cache removes it, once its workers are done."""
    if hasattr(config, "compiled"):
        shutil.rmtree(config.compiled, ignore_errors=True)


@pytest.fixture
def x64():
    """float64 exists inside the test that asks for this."""
    with jax.enable_x64(True):
        yield
