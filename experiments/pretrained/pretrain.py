"""Pre-trains the quickstart's small ViT on the complete Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    python -m experiments.pretrained.pretrain --out runs/pretrain

Writes `weights.safetensors` (of the last epoch so far) and `log.jsonl` (a line per
epoch: loss, accuracy on the test split, seconds) into `--out`. The files in
`experiments/pretrained/` were made by this command with its default values.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.progress import track

from experiments import terminal
from experiments.paths import Given, check_out
from experiments.pretrained import small_vit
from experiments.pretrained.small_vit import SMALL, normalise
from experiments.tasks import fashion_mnist
from snella_jax.models.vit import ViT

PROGRAM = "python -m experiments.pretrained.pretrain"


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Options of `python -m experiments.pretrained.pretrain`."""

    out: Given
    """Folder for the weights and the log."""
    data_dir: Given = fashion_mnist.DEBIAN
    """Folder with the four gzipped IDX files."""
    epochs: int = 30
    """Number of passes over the training images."""
    batch: int = 256
    """Images in a step."""
    lr: float = 2e-3
    """Peak of the cosine schedule, after one epoch of warm-up."""
    weight_decay: float = 0.05
    """Rate of AdamW's weight decay."""
    label_smoothing: float = 0.1
    """Share of a label that is spread over all classes."""
    drop_path: float = 0.1
    """Rate of stochastic depth in the last block."""
    seed: int = 0
    """Seed of the weights, the order and the augmentation."""


def main(argv: list[str] | None = None) -> None:
    """Trains, and writes the weights and the log after every epoch."""
    config = tyro.cli(PretrainConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        train = fashion_mnist.read("train", config.data_dir)
        test = fashion_mnist.read("test", config.data_dir)
    steps = len(train[0]) // config.batch
    architecture = dataclasses.replace(SMALL, drop_path=config.drop_path)
    graphdef, params = nnx.split(ViT(architecture, rngs=nnx.Rngs(config.seed)))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.lr, steps, config.epochs * steps, 1e-5
    )
    tx = optax.adamw(schedule, weight_decay=config.weight_decay)
    opt_state = tx.init(params)
    step = _step(graphdef, tx, config.label_smoothing)
    predict = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))
    batches = _batches(*train, config)
    key = jax.random.key(config.seed)
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / "log.jsonl").open("w", encoding="utf-8") as log:
        for epoch in range(config.epochs):
            start = time.perf_counter()
            losses = []
            for i in track(range(steps), f"epoch {epoch + 1}/{config.epochs}"):
                noise = jax.random.fold_in(key, epoch * steps + i)
                params, opt_state, loss = step(params, opt_state, *next(batches), noise)
                losses.append(loss)
            row = {
                "epoch": epoch + 1,
                "train_loss": round(float(jnp.stack(losses).mean()), 4),
                "test_accuracy": round(_accuracy(predict, params, *test), 4),
                "seconds": round(time.perf_counter() - start, 1),
            }
            print(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
            model = nnx.merge(graphdef, params)
            small_vit.save(model, config.out / "weights.safetensors")


def _step(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, smoothing: float
) -> Callable[..., Any]:
    @jax.jit
    def step(params, opt_state, images, labels, key):
        def loss_fn(params):
            logits = nnx.merge(graphdef, params)(images, key)
            targets = optax.smooth_labels(
                jax.nn.one_hot(labels, fashion_mnist.CLASSES), smoothing
            )
            return optax.softmax_cross_entropy(logits, targets).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def _batches(
    images: np.ndarray, labels: np.ndarray, config: PretrainConfig
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields augmented images and labels without end, each epoch in another order."""
    rng = np.random.default_rng(config.seed)
    whole = len(images) // config.batch * config.batch
    while True:
        order = rng.permutation(len(images))[:whole]
        for batch in order.reshape(-1, config.batch):
            yield normalise(augment(rng, images[batch]) / 255), labels[batch]


def _accuracy(
    predict: Callable[..., Any], params: Any, images: np.ndarray, labels: np.ndarray
) -> float:
    """Returns the share of images whose class has the largest logit."""
    hits = [
        predict(params, normalise(images[i : i + 1000] / 255)).argmax(-1)
        == labels[i : i + 1000]
        for i in range(0, len(images), 1000)
    ]
    return float(np.concatenate(hits).mean())


def augment(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Flips half of the images left to right, and shifts all by up to 2 pixels."""
    flip = rng.random(len(images)) < 0.5
    images = np.where(flip[:, None, None, None], images[:, :, ::-1], images)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    side = np.arange(images.shape[1])
    rows, cols = rng.integers(0, 5, (2, len(images), 1)) + side
    return padded[
        np.arange(len(images))[:, None, None], rows[:, :, None], cols[:, None]
    ]


if __name__ == "__main__":
    main()
