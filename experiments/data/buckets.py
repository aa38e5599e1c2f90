"""Buckets: batches of texts of like length, padded to one of a few lengths.

A program is compiled for every shape that it sees, so batches have few lengths; and
little is computed for padding, since texts of like length stand together.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from experiments.data.source import Source

FILLER = -1  # index of an example that only fills up a batch


@dataclasses.dataclass(frozen=True)
class Group:
    """Examples that make a batch.

    Attributes:
      length: tokens that each is padded to.
      rows: their places in the source; -1 for what fills up.
    """

    length: int
    rows: Int[np.ndarray, " B"]


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Preparation of examples with `tokens`, int32 `[T]`, and `loss`, bool `[T]`.

    Stands where images have a `Transform`: `training` and `evaluation` of
    `experiments.data.pipeline` then make batches of like length.

    Attributes:
      lengths: lengths that batches may have, rising; no example is longer than the
        last.
      pad: id to fill up with.
      evaluated: most examples of a batch that is evaluated.
    """

    lengths: tuple[int, ...]
    pad: int
    evaluated: int = 32

    def __post_init__(self):
        if not self.lengths or list(self.lengths) != sorted({*self.lengths, 1} - {1}):
            raise ValueError(
                f"lengths={self.lengths}: expected different numbers from 2, rising."
            )

    @classmethod
    def of(
        cls, sizes: Sequence[int], count: int, pad: int, multiple: int = 8
    ) -> "Buckets":
        """Returns the buckets that make the least padding.

        >>> Buckets.of([10, 11, 12, 40, 90], count=2, pad=0).lengths
        (16, 96)

        Args:
          sizes: numbers of tokens of the examples.
          count: most buckets; there are fewer where more would save nothing.
          pad: id to fill up with.
          multiple: what lengths are rounded up to.
        """
        rounded = -(-np.asarray(sizes) // multiple) * multiple
        lengths, counts = (x.tolist() for x in np.unique(rounded, return_counts=True))
        total = np.cumsum(counts).tolist()
        # Tokens, and lengths, of the best buckets for all examples up to each length.
        best = [(n * size, (n,)) for n, size in zip(lengths, total, strict=True)]
        for _ in range(count - 1):
            best = [
                min(
                    [best[j]]
                    + [
                        (best[i][0] + n * (total[j] - total[i]), (*best[i][1], n))
                        for i in range(j)
                    ]
                )
                for j, n in enumerate(lengths)
            ]
        return cls(best[-1][1], pad)

    def bucket(self, sizes: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
        """Returns the number of the shortest bucket that each example fits in.

        Raises:
          ValueError: one is longer than the longest.
        """
        if len(sizes) and (longest := int(sizes.max())) > self.lengths[-1]:
            raise ValueError(
                f"an example has {longest} tokens: expected at most {self.lengths[-1]}."
            )
        return np.searchsorted(self.lengths, sizes)

    def epochs(
        self, sizes: Int[np.ndarray, " N"], batch: int, count: int, seed: int
    ) -> list[Group]:
        """Returns epochs of `N // batch` groups, each in an order of its own.

        What is left over of a bucket goes into the next longer one; of the longest it
        is left out, other examples in each epoch.
        """
        draws = (np.random.default_rng((seed, epoch)) for epoch in range(count))
        return [group for rng in draws for group in self._epoch(sizes, batch, rng)]

    def _epoch(
        self, sizes: Int[np.ndarray, " N"], batch: int, rng: np.random.Generator
    ) -> list[Group]:
        order = rng.permutation(len(sizes))
        bucket = self.bucket(sizes)[order]
        groups, rest = [], order[:0]
        for number, length in enumerate(self.lengths):
            rows = np.concatenate([rest, order[bucket == number]])
            full = len(rows) // batch * batch
            groups += [Group(length, part) for part in rows[:full].reshape(-1, batch)]
            rest = rows[full:]
        return [groups[place] for place in rng.permutation(len(groups))]

    def in_order(self, sizes: Int[np.ndarray, " N"], batch: int) -> list[Group]:
        """Returns groups of every example once, the shortest first, filled up."""
        bucket = self.bucket(sizes)
        groups = []
        for number, length in enumerate(self.lengths):
            rows = np.flatnonzero(bucket == number)
            rows = np.pad(rows, (0, -len(rows) % batch), constant_values=FILLER)
            groups += [Group(length, part) for part in rows.reshape(-1, batch)]
        return groups

    def collated(self, source: Source, group: Group) -> dict[str, np.ndarray]:
        """Returns a group's arrays.

        Returns:
          `tokens`, int32 `[B, length]`; `mask`, bool `[B, length]`, True for real
          tokens; `loss`, bool `[B, length]`, True for tokens to learn; `index`, int32
          `[B]`. A filler has one real token, and no loss.
        """
        shape = (len(group.rows), group.length)
        tokens = np.full(shape, self.pad, np.int32)
        mask, loss = np.zeros(shape, bool), np.zeros(shape, bool)
        for place, row in enumerate(group.rows):
            if row == FILLER:
                mask[place, 0] = True  # attention over nothing is no number
                continue
            example = source[int(row)]
            size = len(example["tokens"])
            tokens[place, :size] = example["tokens"]
            loss[place, :size] = example["loss"]
            mask[place, :size] = True
        index = np.maximum(group.rows, 0).astype(np.int32)
        return {"tokens": tokens, "mask": mask, "loss": loss, "index": index}


def sizes(source: Source) -> Int[np.ndarray, " N"]:
    """Returns the number of tokens of every example."""
    return np.asarray([len(source[i]["tokens"]) for i in range(len(source))], np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Batches by their number, as Grain reads them; one process's share of each.

    Attributes:
      source: the examples.
      buckets: how they are padded.
      groups: the batches.
      process: number of this process.
      processes: number of all.
      marks: True to say with `valid`, bool `[B]`, which examples are no fillers.
    """

    source: Source
    buckets: Buckets
    groups: Sequence[Group]
    process: int
    processes: int
    marks: bool

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        whole = self.groups[index]
        group = Group(whole.length, whole.rows[self.process :: self.processes])
        arrays = self.buckets.collated(self.source, group)
        return {**arrays, "valid": group.rows != FILLER} if self.marks else arrays
