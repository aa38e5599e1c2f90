"""From a source to batches: seeded, shuffled, sharded, resumable (Grain).

Every example's place and augmentation depend on the seed and on its position in the
stream alone, not on threads, workers or the number of processes. The iterator's
`get_state` and `set_state` save and restore the position; a restored stream goes on bit
for bit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import grain
import jax
import numpy as np
from absl import flags

from experiments.data.buckets import Batches, Buckets, sizes
from experiments.data.source import Source

Arrays = dict[str, np.ndarray]
Mixing = Callable[[Arrays, np.random.Generator], Arrays]


class Preparation(Protocol):
    """Maker of an example's arrays, such as `transforms.Transform` for images."""

    @property
    def evaluated(self) -> int:
        """Most examples of a batch that is evaluated."""
        ...

    def prepare(self, example: Any, rng: np.random.Generator) -> Arrays:
        """Returns arrays of one shape for all examples; `rng` where they are random."""
        ...


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part of every batch that one process makes: `index` of `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def of_this_process(cls) -> "Shard":
        """Returns that of JAX's process index and count."""
        return cls(jax.process_index(), jax.process_count())

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"shard {self.index} of {self.count}: expected 0 to count - 1."
            )


@dataclasses.dataclass(frozen=True)
class Reading:
    """Settings of how batches are made ahead of time.

    Attributes:
      threads: number of threads, each of which makes a batch.
      ahead: number of batches that may wait.
      workers: number of processes that share the work; 0 for threads alone.
    """

    threads: int = 4
    ahead: int = 8
    workers: int = 0


def training(
    source: Source,
    transform: Preparation | Buckets,
    *,
    batch: int,
    epochs: int,
    seed: int,
    mix: Mixing | None = None,
    shard: Shard = Shard(),
    reading: Reading = Reading(),
) -> grain.IterDataset:
    """Returns batches of shuffled, augmented examples, epoch after epoch.

    An epoch is `len(source) // batch` batches in an order of its own; what is left over
    is left out, as in the released recipe. The shards of a batch are disjoint.

    Args:
      source: the examples.
      transform: makes arrays of them; `Buckets` also choose which make a batch, and
        their batches have several shapes.
      batch: examples in a batch, over all shards.
      epochs: number of epochs until the stream ends.
      seed: decides the order and everything that is drawn.
      mix: changes whole batches (mixup, say); a shard mixes within itself.
      shard: the part that is made here.
      reading: how far ahead.

    Returns:
      Batches of what `transform` makes, `[batch / count, ...]`, and `index`, int32, the
      examples' places in the source.

    Raises:
      ValueError: the batch is larger than the source, or no multiple of the shards.
    """
    if not 1 <= batch <= len(source):
        raise ValueError(f"batch={batch}: expected 1 to {len(source)} examples.")
    if batch % shard.count:
        raise ValueError(f"batch={batch}: {shard.count} processes do not divide it.")
    if isinstance(transform, Buckets):
        groups = transform.epochs(sizes(source), batch, epochs, seed)
        made = Batches(source, transform, groups, shard.index, shard.count, marks=False)
        batches, epochs = grain.MapDataset.source(made).seed(seed), 1
    else:
        used = len(source) // batch * batch
        examples = grain.MapDataset.source(_Indexed(source)).seed(seed).shuffle()
        examples = examples.random_map(_Prepared(transform))
        examples = examples.slice(slice(shard.index, used, shard.count))
        batches = examples.batch(batch // shard.count, drop_remainder=True)
    if mix is not None:
        batches = batches.random_map(mix)
    return _read(batches.repeat(epochs), reading)


def evaluation(
    source: Source,
    transform: Preparation | Buckets,
    *,
    batch: int,
    shard: Shard = Shard(),
    reading: Reading = Reading(),
) -> grain.IterDataset:
    """Returns every example once, in order; the last batches are filled up.

    `Buckets` have an order of their own, and fill up the last batches of each length.

    Returns:
      Batches of what `transform` makes, `index` and `valid`, which is False for what
      fills up. All have one shape, but those of `Buckets`, and every shard has as many.

    Raises:
      ValueError: the batch is no positive multiple of the shards.
    """
    if batch < 1 or batch % shard.count:
        raise ValueError(
            f"batch={batch}: expected a positive multiple of {shard.count} processes."
        )
    if isinstance(transform, Buckets):
        groups = transform.in_order(sizes(source), batch)
        made = Batches(source, transform, groups, shard.index, shard.count, marks=True)
        return _read(grain.MapDataset.source(made), reading)
    filled = -(-len(source) // batch) * batch
    examples = grain.MapDataset.range(shard.index, filled, shard.count)
    examples = examples.map(_Filled(source, transform))
    return _read(examples.batch(batch // shard.count), reading)


def to_devices(stream: grain.IterDataset, sharding: jax.sharding.Sharding) -> Any:
    """Returns the batches as arrays on devices, a few of them ahead of their use.

    Args:
      stream: this process's shard of the batches.
      sharding: of the whole batch, such as `NamedSharding(mesh, P("data"))`; its
        devices may be those of several processes.
    """

    def place(batch: Arrays) -> dict[str, jax.Array]:
        make = jax.make_array_from_process_local_data
        return {name: make(sharding, array) for name, array in batch.items()}

    ahead = grain.experimental.ThreadPrefetchIterDataset
    return ahead(stream.map(place), prefetch_buffer_size=2)


@dataclasses.dataclass(frozen=True)
class _Indexed:
    """Source whose examples know their index: a failing step can name them."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.source[index], "index": index}


@dataclasses.dataclass(frozen=True)
class _Prepared:
    transform: Preparation

    def __call__(self, example: Any, rng: np.random.Generator) -> Arrays:
        return {
            **self.transform.prepare(example, rng),
            "index": np.asarray(example["index"], np.int32),
        }


@dataclasses.dataclass(frozen=True)
class _Filled:
    source: Source
    transform: Preparation

    def __call__(self, index: int) -> Arrays:
        valid = index < len(self.source)
        index = index if valid else 0
        arrays = self.transform.prepare(self.source[index], np.random.default_rng(0))
        own = {"index": np.asarray(index, np.int32), "valid": np.asarray(valid)}
        return {**arrays, **own}


def _read(batches: grain.MapDataset, reading: Reading) -> grain.IterDataset:
    options = grain.ReadOptions(reading.threads, reading.ahead)
    stream = batches.to_iter_dataset(options)
    if reading.workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers are set up by absl's flags
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(reading.workers))
    return stream
