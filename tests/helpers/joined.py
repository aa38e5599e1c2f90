"""Trains a tiny LLaMA and a tiny ViT on four devices, those of one process or of two.

    python joined.py FOLDER ROLE

joins the other process (`experiments.processes`) and takes a role: "start" writes all
files of a state that one process has trained, and trains from the start with a
checkpoint on the way; "resume" goes on from that; "fail" has an error in one process.
"""

import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from places import ASSETS

import snella_jax as snella
from experiments import processes
from experiments.benchmarks import batches
from experiments.files import load, save
from experiments.training import blocks, sharding
from experiments.training.checkpoints import Checkpoints
from experiments.training.step import training_step
from snella_jax import models
from snella_jax.core.paths import join, path_of
from snella_jax.files.hosts import to_host
from snella_jax.models import llama

MESH = "fsdp=2,tensor=2"
STEPS, AT = 4, 2  # all of them, and those before the checkpoint
VIT = ASSETS / "vit/classifier"
TARGETS = {
    "llama": "blocks/.*/(q|k|v|o|gate|up|down)",
    "vit": "blocks/.*/(query|out|fc1|fc2)",
}


def base(name: str) -> Any:
    if name == "vit":
        return models.load(VIT, image_size=24)
    config = llama.LlamaConfig(
        vocab_size=32, width=16, depth=2, heads=4, kv_heads=2, head_dim=4, mlp_dim=24,
        remat="blocks",
    )  # fmt: skip
    return llama.Llama(config, rngs=nnx.Rngs(0))


def spread(value: Any, where: jax.sharding.Sharding) -> jax.Array:
    """Puts an array, which every process has, onto the devices of all."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, where, lambda at: value[at])


class Run:
    """One model on its way: `state` has what moves."""

    def __init__(self, name: str):
        self.name, self.mesh = name, sharding.make(MESH)
        whole = base(name)
        graphdef, state = nnx.split(whole)
        self.plain = nnx.merge(graphdef, sharding.place(state, self.mesh))
        trainable = "head|cls_token" if name == "vit" else ""
        config = snella.SnellaConfig(
            rank=4, targets=TARGETS[name], trainable=trainable, target_density=0.3
        )
        model = snella.adapt(self.plain, config, rngs=nnx.Rngs(1))
        self.graphdef, trainable, budgets, frozen = snella.partition(model)
        self.tx = optax.chain(snella.track_importance(), optax.sgd(0.1, momentum=0.9))
        self.frozen = sharding.place(frozen, self.mesh)
        trainable = sharding.place(trainable, self.mesh)
        self.state = sharding.place(
            {
                "trainable": trainable,
                "opt_state": self.tx.init(trainable),
                "budgets": budgets,
            },
            self.mesh,
        )
        self.weights, self.config = snella.adapted_weights(model), config
        pinned = nnx.merge(self.graphdef, trainable, budgets, frozen)
        blocks.pin(pinned, self.mesh)
        loss = batches.objective(whole.config).loss
        kinds = nnx.Param, snella.Budget, ...
        where = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        where = where["trainable"], where["opt_state"]
        step = training_step(nnx.split(pinned, *kinds)[0], self.tx, loss, 1, where[0])
        self.step = jax.jit(step, out_shardings=(*where, None))
        batch = batches.batch(whole.config, 4, 12)
        if name == "vit":
            batch["label"] %= whole.config.num_classes
        rows = sharding.of_batches(self.mesh)
        self.batch = {key: spread(value, rows) for key, value in batch.items()}

    @property
    def model(self) -> Any:
        own = self.state["trainable"], self.state["budgets"], self.frozen
        return nnx.merge(self.graphdef, *own)

    def train(self, first: int, last: int) -> None:
        """Takes steps; budgets move before every second."""
        for index in range(first, last):
            if index % 2:
                total = self.config.schedule(self.weights, steps=STEPS)(index)
                self.state["budgets"], _ = snella.reallocate(
                    self.state["budgets"], self.state["opt_state"], total
                )
            state = self.state
            trainable, opt_state, _ = self.step(
                state["trainable"], state["opt_state"], state["budgets"], self.frozen,
                self.batch, jax.random.fold_in(jax.random.key(0), index),
            )  # fmt: skip
            self.state |= {"trainable": trainable, "opt_state": opt_state}

    def values(self) -> dict[str, np.ndarray]:
        """All of the state, whole, on the host."""
        leaves = jax.tree_util.tree_leaves_with_path(self.state)
        return {join(path_of(path)): to_host(leaf) for path, leaf in leaves}

    def take(self, values: dict[str, np.ndarray]) -> None:
        """Puts such values into the state."""

        def placed(path, leaf):
            return spread(values[join(path_of(path))], leaf.sharding)

        self.state = jax.tree_util.tree_map_with_path(placed, self.state)

    def write(self, folder: Path) -> None:
        """Writes the adapter, the file of differences and the exported model."""
        model = self.model
        snella.save(model, folder / f"{self.name}_adapter")
        merged = snella.merge(model)
        snella.save_delta(folder / f"{self.name}.safetensors", self.plain, merged)
        if self.name == "vit":
            snella.export(model, folder / "vit_export.safetensors", like=VIT)
        else:
            snella.export(model, folder / "llama_export")

    def checkpoints(self, folder: Path) -> Checkpoints:
        metric = batches.objective(models.PRESETS["vit_b16"]).metrics[0]
        return Checkpoints(folder / f"{self.name}_checkpoints", metric)


def train(folder: Path, name: str) -> None:
    """Trains to the checkpoint, writes that while it goes on, and the last values."""
    run = Run(name)
    run.train(0, AT)
    saved = run.checkpoints(folder)
    saved.save(AT, run.state, {"next": AT}, None)
    run.train(AT, STEPS)
    saved.close()
    save(folder / f"{name}_whole.npz", run.values())


def resume(folder: Path, name: str) -> None:
    run = Run(name)
    saved = run.checkpoints(folder)
    found = saved.newest(run.state)
    saved.close()
    assert found is not None and (found[0], found[2]) == (AT, {"next": AT})
    run.state = found[1]
    run.train(AT, STEPS)
    save(folder / f"{name}_resumed.npz", run.values())


def write(folder: Path, name: str) -> None:
    run = Run(name)
    run.take(load(folder / f"{name}_one.npz"))
    run.write(folder / "two")


def fail(folder: Path) -> None:
    """An error in the second process, while the first waits for it."""
    x = spread(np.ones(4), sharding.of_batches(sharding.make(MESH)))
    if jax.process_index() == 1:
        raise ValueError("the second process has had enough")
    print(jax.jit(jnp.sum)(x))
    time.sleep(600)


def main(folder: Path, role: str) -> None:
    processes.join()
    if role == "fail":
        fail(folder)
    for name in TARGETS:
        if role == "start":  # all that needs no other process to have been
            write(folder, name)
            train(folder, name)
        else:
            resume(folder, name)
    print("done", flush=True)
    if role == "start":
        time.sleep(600)  # until it is killed


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
