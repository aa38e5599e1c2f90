"""One of two processes that train together, of which the second is told to stop.

`python stopped_pair.py FOLDER ADDRESS NUMBER` trains until both stop, goes on, and
trains once more without a stop; its last line is what it found, in JSON.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from experiments.data.source import Arrays
from experiments.data.transforms import Transform
from experiments.training import sharding, stopping
from experiments.training.checkpoints import Checkpoints
from experiments.training.classification import Classification
from experiments.training.recipe import Recipe
from experiments.training.trainer import Data, Trainer
from snella_jax.models.vit import ViT, ViTConfig

TINY = ViTConfig(
    width=8, depth=1, heads=2, patch_size=4, image_size=8, channels=1, num_classes=2
)
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
SOURCE = Arrays(PIXELS, np.arange(40) % 2)
TRANSFORM = Transform((8, 8), mean=(0.5,), std=(0.5,))
CLASSES = Classification()


def trained(folder, at=None, seconds=0.0):
    """Returns the losses of rounds and a digest of the weights.

    Args:
      at: step after which this process gets USR2.
      seconds: how long it sleeps after each step: JAX looks for a signal each second.
    """
    steps = [0]

    def on_step(_):
        steps[0] += 1
        time.sleep(seconds)
        if steps[0] == at:
            os.kill(os.getpid(), signal.SIGUSR2)

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stopping.deferred())
        saved = Checkpoints(folder, CLASSES.metrics[0])
        stack.callback(saved.close)
        trainer = Trainer(
            ViT(TINY, rngs=nnx.Rngs(0)),
            Data(SOURCE, None, TRANSFORM, TRANSFORM),
            CLASSES,
            Recipe(epochs=3, batch=4, lr=1e-2),
            sharding.make(None),
            checkpoints=saved,
            stop=stop,
        )
        stack.callback(trainer.close)
        losses = [done.train_loss for done in trainer.train(on_step)]
        leaves = jax.tree.leaves(nnx.state(trainer.model, nnx.Param))
        digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves))
        return losses, digest.hexdigest()


def main(folder, address, number):
    """Prints what happened."""
    jax.distributed.initialize(address, 2, number)
    try:
        trained(folder / "stopped", at=3 if number else None, seconds=0.3)
        said = status = None
    except stopping.Stopped as stop:
        said, status = str(stop), stop.code
    stopped, whole = trained(folder / "stopped"), trained(folder / "whole")
    found = {"said": said, "status": status, "stopped": stopped, "whole": whole}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
