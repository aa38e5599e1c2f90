"""Files of `.safetensors` whose bytes depend on what they hold alone."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def write_tensors(
    tensors: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str]
) -> None:
    """Writes tensors in C order, and metadata sorted by name.

    `save_file` leaves metadata in an order that is another one in every process.
    """
    save_file(dict(tensors), path, dict(metadata))
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise AssertionError("safetensors writes JSON in another way than Python")
        file.seek(8)
        file.write(text.ljust(size))
