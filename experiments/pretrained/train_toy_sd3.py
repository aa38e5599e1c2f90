"""Trains the toy of Stable Diffusion 3 on Twemoji, or goes on where it was stopped.

    npm pack emoji-datasource-twitter@16.0.0
    tar xzf emoji-datasource-twitter-16.0.0.tgz
    pip install --no-deps open-clip-torch==3.3.0
    python -m experiments.pretrained.train_toy_sd3 --out runs/toy_sd3

Writes into `--out`, every `--every` updates: `state.npz` to go on from, `log.jsonl` (a
line for each), `toy_sd3.safetensors` (the mean of the weights) and `sheet.png`. A
killed training that is started again gives the same weights, bit for bit. It may be
given another number of updates then, as long as the rate's decay, in the last fifth,
has begun for neither. A finished one may be made longer by a quarter or more: the rate
then rises to its full height again. The files in `experiments/pretrained/` were made by
this command with `--updates 8000`, and then with its default values.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.progress import Progress

from experiments import files, terminal
from experiments.paths import Given, check_out
from experiments.pretrained import toy_pictures, toy_sd3
from experiments.pretrained.toy_sd3 import SHIFT, Toy, ToyConfig
from experiments.pretrained.toy_text import Words, vocabulary
from experiments.tasks import emoji, emoji_captions
from experiments.tasks.emoji_captions import SPARE, Album
from experiments.training.flow_matching import FlowMatching
from snella_jax.models.sd3.tokenizers import clip_tokenizer

PROGRAM = "python -m experiments.pretrained.train_toy_sd3"
CONFIG, STATE, LOG = "config.json", "state.npz", "log.jsonl"
WEIGHTS = "toy_sd3.safetensors"
# The plain error of the velocity, at noise levels whose median is 0.5.
OBJECTIVE = FlowMatching(precondition=False, noise_shift=SHIFT)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of `python -m experiments.pretrained.train_toy_sd3`."""

    out: Given
    """Folder for the state, the log, the weights and a sheet of pictures."""
    emoji: Given = emoji.FOLDER
    """Folder of the unpacked package emoji-datasource-twitter."""
    updates: int = 10_000
    """Number of updates, in the last fifth of which the rate falls."""
    batch: int = 64
    """Pictures in an update."""
    lr: float = 1e-3
    """Rate after the warm-up and before it falls, to a hundredth."""
    warmup: int = 500
    """Updates of the warm-up."""
    weight_decay: float = 0.01
    """Rate of AdamW's weight decay."""
    ema: float = 0.999
    """Decay of the mean of the weights, which is what is kept."""
    every: int = 200
    """Updates from one state that is written to the next."""
    seed: int = 0
    """Seed of the weights, the order, the captions and the noise."""
    toy: ToyConfig = dataclasses.field(default_factory=ToyConfig)
    """Shape of the model."""

    @property
    def falls(self) -> int:
        """Update after which the rate falls."""
        return self.updates - self.updates // 5


class State(NamedTuple):
    """Everything that an update changes.

    Attributes:
      params: weights.
      mean: exponential moving mean of them.
      moments: state of the optimiser.
    """

    params: Any
    mean: Any
    moments: Any


def main(argv: list[str] | None = None) -> None:
    """Trains, and writes what the module's docstring says."""
    config = tyro.cli(TrainConfig, prog=PROGRAM, args=argv, description=__doc__)
    with terminal.exit_on_error(PROGRAM):
        check_out(config.out)
        if not 0 < config.warmup < config.falls:
            raise ValueError(
                f"--warmup {config.warmup}: expected 1 to {config.falls - 1}."
            )
        found = emoji.read(config.emoji)
        clip = clip_tokenizer()
        album = emoji_captions.album(found, [e for e in found if not e.unseen])
        _check_same(config)
    ids = vocabulary(clip, emoji_captions.texts(found))
    first = len(ids) - 2
    spare = {word: first + row for row, word in enumerate(SPARE)}
    words = Words(clip, ids, config.toy.length, spare)
    toy = Toy(config.toy, words.size, rngs=nnx.Rngs(config.seed))
    with terminal.exit_on_error(PROGRAM):
        _train(config, toy, words, album)


def _check_same(config: TrainConfig) -> None:
    """Raises a `MismatchError` if the folder is of another training."""
    there = files.read(config.out / CONFIG)
    if there is not None and {**there, "updates": 0} != {
        **_fields(config),
        "updates": 0,
    }:
        raise files.MismatchError(
            f"{config.out / CONFIG} is of another training: {there}."
        )


def _fields(config: TrainConfig) -> dict[str, Any]:
    """Returns what the weights depend on."""
    fields = dataclasses.asdict(config)
    for free in ("out", "emoji", "every"):
        del fields[free]
    return fields


def _begin(config: TrainConfig, update: int) -> None:
    """Writes the config; raises a `MismatchError` if its length cannot be changed."""
    there = files.read(config.out / CONFIG) or _fields(config)
    old = dataclasses.replace(config, updates=there["updates"])
    finished = update == old.updates <= config.falls
    if old != config and update > min(old.falls, config.falls) and not finished:
        raise files.MismatchError(
            f"--updates {config.updates}: after {update} updates it is too late for "
            f"another number than {old.updates}, until these are done."
        )
    config.out.mkdir(parents=True, exist_ok=True)
    files.write(config.out / CONFIG, _fields(config))


def _schedule(config: TrainConfig) -> optax.Schedule:
    """Returns the rate by update."""
    parts = [
        optax.linear_schedule(0.0, config.lr, config.warmup),
        optax.constant_schedule(config.lr),
        optax.linear_schedule(config.lr, config.lr / 100, config.updates // 5),
    ]
    return optax.join_schedules(parts, [config.warmup, config.falls])


def _train(config: TrainConfig, toy: Toy, words: Words, album: Album) -> None:
    graphdef, params, rest = nnx.split(toy, nnx.Param, ...)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(_schedule(config), b2=0.99, weight_decay=config.weight_decay),
    )
    state = State(params, params, tx.init(params))
    state, update, log = _resumed(config.out, state)
    _begin(config, update)
    step = _step(config, graphdef, rest, tx)
    losses, begun = [], time.process_time()
    with Progress(transient=True) as progress:
        bar = progress.add_task("training", total=config.updates, completed=update)
        for batch in _batches(album, words, config, update):
            state, loss = step(state, jnp.int32(update), *batch)
            losses.append(loss)
            update += 1
            progress.advance(bar)
            if update % config.every and update < config.updates:
                continue
            row = {
                "update": update,
                "passes": round(update * config.batch / len(album), 1),
                "loss": round(float(jnp.stack(losses).mean()), 5),
                "cpu_seconds": round(time.process_time() - begun, 1),
            }
            print(row)
            log.append(row)
            losses, begun = [], time.process_time()
            nnx.update(toy, state.mean)
            _write(config.out, state, log, toy, words)


def _step(config: TrainConfig, graphdef: Any, rest: Any, tx: Any) -> Any:
    key = jax.random.key(config.seed)

    @jax.jit
    def step(state: State, update: Any, pictures: Any, tokens: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            toy: Any = nnx.merge(graphdef, params, rest)
            context, pooled = toy.tower(tokens)
            mean = pictures.astype(jnp.float32) / 127.5 - 1
            batch = {"mean": mean, "context": context, "pooled": pooled}
            own = jax.random.fold_in(key, update)
            return OBJECTIVE.loss(toy.transformer, batch, own)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, moments = tx.update(grads, state.moments, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(config.ema, (1 + update) / (10 + update))
        mean = optax.incremental_update(params, state.mean, 1 - decay)
        return State(params, mean, moments), loss

    return step


def _batches(
    album: Album, words: Words, config: TrainConfig, update: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields pictures and tokens from an update to the last one.

    Each pass has an order of its own; both depend on the seed and the update alone.
    """
    for number in range(update, config.updates):
        rng = np.random.default_rng((config.seed, 0, number))
        places = np.arange(number * config.batch, (number + 1) * config.batch)
        passes, at = np.divmod(places, len(album))
        orders = {
            one: np.random.default_rng((config.seed, 1, one)).permutation(len(album))
            for one in set(passes.tolist())
        }
        drawn = [
            album.example(int(orders[one][where]), rng)
            for one, where in zip(passes.tolist(), at.tolist(), strict=True)
        ]
        pictures, captions = zip(*drawn, strict=True)
        yield np.stack(pictures), words.padded(captions)


def _resumed(out: Path, state: State) -> tuple[State, int, list[dict[str, Any]]]:
    """Returns the state that the folder has, its update and the log up to there.

    Raises:
      MismatchError: the file does not fit.
    """
    path = out / STATE
    if not path.exists():
        return state, 0, []
    arrays = files.load(path)
    log = json.loads(str(arrays.pop("log")))
    leaves, structure = jax.tree.flatten(state)
    if [a.shape for a in arrays.values()] != [jnp.shape(leaf) for leaf in leaves]:
        raise files.MismatchError(f"{path} is of another model.")
    state = jax.tree.unflatten(structure, map(jnp.asarray, arrays.values()))
    return state, log[-1]["update"], log


def _write(
    out: Path, state: State, log: list[dict[str, Any]], toy: Toy, words: Words
) -> None:
    """Writes the state, and what is made from it."""
    leaves = jax.tree.leaves(state)
    arrays = {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    files.save(out / STATE, {**arrays, "log": np.asarray(json.dumps(log))})
    files.replace(out / LOG, "".join(json.dumps(row) + "\n" for row in log))
    toy_sd3.save(toy, words.ids, out / WEIGHTS)
    toy_pictures.sheet(toy_sd3.pipeline(toy, words), out / "sheet.png")


if __name__ == "__main__":
    main()
