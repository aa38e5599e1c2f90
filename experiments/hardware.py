"""Names of the devices and the host that results were made on."""

import os

import jax


def describe(devices: str = "") -> str:
    """Returns the devices and the host's cores as results name them.

    Args:
      devices: the devices' name; by default the kind of the first one.

    >>> describe("4 x cpu").startswith("4 x cpu, "), describe().endswith("host cores")
    (True, True)
    """
    kind = devices or jax.devices()[0].device_kind
    return f"{kind}, {os.cpu_count()} host cores"
