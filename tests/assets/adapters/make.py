"""Made the adapters beside this file; every later version has to read each format.

`python tests/assets/adapters/make.py FOLDER` with `tests` on the path. An adapter of
`every_kind.Every` (its parameters in `base.npz`, since initial values are not promised
to stay), trained for three steps; its outputs, the sparse delta file of its merged
weights.
"""

import sys
from pathlib import Path

import numpy as np
from every_kind import IMAGES, Every, every, leaves, outputs, trained
from flax import nnx

import snella_jax as snella


def main(folder: Path) -> None:
    base = Every(nnx.Rngs(0))
    model = trained(every())
    snella.save(model, folder / "adapter", base="tests/helpers/every_kind.py")
    snella.save_delta(folder / "delta.safetensors", base, snella.merge(model))
    np.savez(
        folder / "base.npz", **{p: value for p, (_, value) in leaves(base).items()}
    )
    np.savez(folder / "expected.npz", images=IMAGES, outputs=outputs(model))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
