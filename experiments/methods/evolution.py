"""An evolutionary search over the sizes of modules, block by block.

That of Guo et al. (arXiv 1904.00420), which NOAH uses: the best of all that were
tried are the parents of a generation, half of which are mutations and half crossings.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

Subnet = tuple[tuple[int, ...], ...]  # a size for every block, of each kind of module
MUTATED, DEEPENED = 0.2, 0.4  # the chances of a kind, and then of its depth
TRIES = 100  # to find a subnet that is allowed and new


@dataclasses.dataclass(frozen=True)
class Space:
    """All subnets: of each kind the first blocks have modules, the others none.

    Attributes:
      blocks: in the model.
      kinds: of modules.
      depths: how many blocks may have modules of a kind.
      sizes: that a module may have.
    """

    blocks: int
    kinds: int
    depths: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def smallest(self) -> Subnet:
        """The one with the fewest and smallest modules."""
        depth = min(self.depths)
        row = (*[min(self.sizes)] * depth, *[0] * (self.blocks - depth))
        return (row,) * self.kinds

    def random(self, rng: np.random.Generator) -> Subnet:
        """Every depth alike, then every size."""
        return tuple(self._row(rng, self._depth(rng)) for _ in range(self.kinds))

    def mutated(self, rng: np.random.Generator, net: Subnet) -> Subnet:
        """Some kinds get another depth, or other sizes here and there."""
        return tuple(
            self._changed(rng, row) if rng.random() < MUTATED else row for row in net
        )

    def crossed(self, rng: np.random.Generator, one: Subnet, other: Subnet) -> Subnet:
        """Returns a subnet with each kind of module from one parent or the other."""
        return tuple(
            a if rng.random() < 0.5 else b for a, b in zip(one, other, strict=True)
        )

    def _changed(self, rng: np.random.Generator, row: tuple[int, ...]) -> tuple:
        new = self._row(rng, self.blocks)
        if rng.random() < DEEPENED:
            depth, used = self._depth(rng), sum(size > 0 for size in row)
            kept = (*row[:used], *new[used:])[:depth]
            return (*kept, *[0] * (self.blocks - depth))
        return tuple(
            n if size and rng.random() < MUTATED else size
            for n, size in zip(new, row, strict=True)
        )

    def _depth(self, rng: np.random.Generator) -> int:
        return int(rng.choice(self.depths))

    def _row(self, rng: np.random.Generator, depth: int) -> tuple[int, ...]:
        sizes = rng.choice(self.sizes, depth).tolist()
        return (*sizes, *[0] * (self.blocks - depth))


def evolve(
    space: Space,
    score: Callable[[Subnet], float],
    allowed: Callable[[Subnet], bool],
    *,
    population: int,
    parents: int,
    seed: int,
) -> Iterator[dict[Subnet, float]]:
    """Generation after generation, the scores of all so far, the best first.

    The smallest is always among them, and the first that was tried comes first among
    equals. No subnet is scored twice.

    Args:
      space: to search in.
      score: of a subnet; more is better.
      allowed: whether a subnet counts.
      population: subnets that are scored in a generation.
      parents: the best so far, from which the next generation comes.
      seed: of all that is drawn.
    """
    rng = np.random.default_rng(seed)
    scores = {space.smallest: score(space.smallest)}

    def grow(make: Callable[[], Subnet], total: int) -> None:
        """Scores new ones until there are so many, or no new ones turn up."""
        tries = TRIES
        while len(scores) < total and tries:
            net, tries = make(), tries - 1
            if net not in scores and allowed(net):
                scores[net], tries = score(net), TRIES

    def parent() -> Subnet:
        return best[rng.integers(len(best))]

    grow(lambda: space.random(rng), population)
    while True:
        scores = dict(sorted(scores.items(), key=lambda item: -item[1]))
        yield scores
        best, before = list(scores)[:parents], len(scores)
        grow(lambda: space.mutated(rng, parent()), before + population // 2)
        grow(lambda: space.crossed(rng, parent(), parent()), before + population)
        grow(lambda: space.random(rng), before + population)
