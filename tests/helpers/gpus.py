"""Devices as JAX describes them."""

from types import SimpleNamespace


def device(platform="gpu", version="PJRT C API\ncuda 12090", capability="9.0"):
    """A device that is not there; by default an H100."""
    client = SimpleNamespace(platform_version=version)
    return SimpleNamespace(
        platform=platform, client=client, compute_capability=capability
    )
