"""From a source to batches: seeded, shuffled, sharded, resumable (Grain).

Every example's place and augmentation depend on the seed and on its position in the
stream alone, not on threads, workers or the number of processes. The iterator's
`get_state` and `set_state` save and restore the position; a restored stream goes on bit
for bit.
"""

import dataclasses
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from experiments.data.mix import Mix
from experiments.data.source import Source
from experiments.data.transforms import Transform


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which part of every batch this process makes: `index` of `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def of_this_process(cls) -> "Shard":
        """By JAX's process index and count."""
        return cls(jax.process_index(), jax.process_count())

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"shard {self.index} of {self.count}: expected 0 to count - 1."
            )


@dataclasses.dataclass(frozen=True)
class Reading:
    """How batches are made ahead of time.

    Attributes:
      threads: that make a batch each.
      ahead: batches that may wait.
      workers: processes that share the work; 0 for threads alone.
    """

    threads: int = 4
    ahead: int = 8
    workers: int = 0


def training(
    source: Source,
    transform: Transform,
    *,
    batch: int,
    epochs: int,
    seed: int,
    mix: Mix | None = None,
    shard: Shard = Shard(),
    reading: Reading = Reading(),
) -> grain.IterDataset:
    """Batches of shuffled, augmented examples, epoch after epoch.

    An epoch is `len(source) // batch` batches in an order of its own; what is left over
    is left out, as in the released recipe. The shards of a batch are disjoint.

    Args:
      batch: images in a batch, over all shards.
      epochs: until the stream ends.
      mix: what happens to whole batches, such as mixup; a shard mixes within itself.

    Returns:
      Batches of `image` float32 `[batch / count, H, W, C]` and `label`, int32 `[.]` or
      what `mix` makes of it.

    Raises:
      ValueError: the batch is larger than the source, or no multiple of the shards.
    """
    if not 1 <= batch <= len(source):
        raise ValueError(f"batch={batch}: expected 1 to {len(source)} examples.")
    if batch % shard.count:
        raise ValueError(f"batch={batch}: {shard.count} processes do not divide it.")
    used = len(source) // batch * batch
    examples = grain.MapDataset.source(_Indexed(source)).seed(seed).shuffle()
    examples = examples.random_map(_Transformed(transform))
    examples = examples.slice(slice(shard.index, used, shard.count))
    batches = examples.batch(batch // shard.count, drop_remainder=True)
    if mix is not None:
        batches = batches.random_map(mix)
    return _read(batches.repeat(epochs), reading)


def evaluation(
    source: Source,
    transform: Transform,
    *,
    batch: int,
    shard: Shard = Shard(),
    reading: Reading = Reading(),
) -> grain.IterDataset:
    """Every example once, in order; the last batches are filled up.

    Returns:
      Batches of `image`, `label` and `valid` (False for what fills up). All have one
      shape, and every shard has as many.
    """
    if batch < 1 or batch % shard.count:
        raise ValueError(
            f"batch={batch}: expected a positive multiple of {shard.count} processes."
        )
    filled = -(-len(source) // batch) * batch
    examples = grain.MapDataset.range(shard.index, filled, shard.count)
    examples = examples.map(_Filled(source, transform))
    return _read(examples.batch(batch // shard.count), reading)


def to_devices(stream: grain.IterDataset, sharding: jax.sharding.Sharding) -> Any:
    """The batches as arrays on devices, a few of them ahead of their use.

    Args:
      stream: this process's shard of the batches.
      sharding: of the whole batch, such as `NamedSharding(mesh, P("data"))`; its
        devices may be those of several processes.
    """

    def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        make = jax.make_array_from_process_local_data
        return {name: make(sharding, array) for name, array in batch.items()}

    ahead = grain.experimental.ThreadPrefetchIterDataset
    return ahead(stream.map(place), prefetch_buffer_size=2)


@dataclasses.dataclass(frozen=True)
class _Indexed:
    """A source whose examples know their index: a failing step can name them."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.source[index], "index": index}


@dataclasses.dataclass(frozen=True)
class _Transformed:
    transform: Transform

    def __call__(self, example: Any, rng: np.random.Generator) -> dict[str, Any]:
        image = self.transform(example["image"], rng)
        label, index = np.int32(example["label"]), np.int32(example["index"])
        return {"image": image, "label": label, "index": index}


@dataclasses.dataclass(frozen=True)
class _Filled:
    source: Source
    transform: Transform

    def __call__(self, index: int) -> dict[str, Any]:
        valid = index < len(self.source)
        example = self.source[index if valid else 0]
        image = self.transform(example["image"], np.random.default_rng(0))
        label = np.int32(example["label"] if valid else 0)
        return {"image": image, "label": label, "valid": np.bool_(valid)}


def _read(batches: grain.MapDataset, reading: Reading) -> grain.IterDataset:
    options = grain.ReadOptions(reading.threads, reading.ahead)
    stream = batches.to_iter_dataset(options)
    if reading.workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers are set up by absl's flags
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(reading.workers))
    return stream
