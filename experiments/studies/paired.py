"""Statistics of methods that were tested on the same images with the same seeds.

A table of one task has a row for each seed and a column for each test image: 1 where a
method is right, or the difference of two methods. Images and seeds are crossed and both
are samples, so neither alone tells how far a mean may be off. Its variance comes from
the mean squares of a two-way layout without repetitions, its degrees of freedom from
Satterthwaite's approximation, its interval from Student's t. Three seeds are too few to
resample: the bootstrap takes two thirds of their variance.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

LEVEL = 0.95
FEWEST = 6  # tasks, below which mean ranks have no interval


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean in points, with what it may be off.

    Attributes:
      value: the mean.
      error: standard error.
      freedom: degrees of freedom of the error.
      seeds: number of seeds; of one seed the error is that of the images alone.
      images: number of test images.
    """

    value: float
    error: float
    freedom: float
    seeds: int
    images: int

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the 95% interval."""
        if not self.error:
            return self.value, self.value
        half = float(stats.t.ppf((1 + LEVEL) / 2, self.freedom)) * self.error
        return self.value - half, self.value + half

    def as_dict(self) -> dict[str, float]:
        """Returns the fields and the ends of the interval, for JSON."""
        low, high = self.interval
        return dataclasses.asdict(self) | {"low": low, "high": high}


def mean(table: Float[np.ndarray, "seeds images"]) -> Mean:
    """Returns the mean of a table, in points.

    The variance of the mean is `(MS_seeds + MS_images - MS_rest) / (S N)` with none of
    the first two taken below the third (a variance component is not negative).

    Raises:
      ValueError: there are fewer than two images.

    >>> one = mean(np.array([[1.0, 0.0, 1.0, 0.0]]))  # 100 sqrt(1/3 / 4), a seed
    >>> one.value, round(one.error, 2), one.freedom
    (50.0, 28.87, 3.0)
    """
    values = 100 * np.asarray(table, float)
    seeds, images = values.shape
    if images < 2:
        raise ValueError(f"{images} test images: expected two or more.")
    whole, by_seed, by_image = values.mean(), values.mean(1), values.mean(0)
    of_images = seeds * np.square(by_image - whole).sum() / (images - 1)
    if seeds == 1:
        error = math.sqrt(of_images / images)
        return Mean(float(whole), error, float(images - 1), seeds, images)
    of_seeds = images * np.square(by_seed - whole).sum() / (seeds - 1)
    rest = np.square(values - by_seed[:, None] - by_image + whole)
    of_rest = rest.sum() / ((seeds - 1) * (images - 1))
    parts = max(of_seeds, of_rest), max(of_images, of_rest), of_rest
    counts = seeds - 1, images - 1, (seeds - 1) * (images - 1)
    variance = parts[0] + parts[1] - parts[2]
    spread = sum(part**2 / count for part, count in zip(parts, counts, strict=True))
    freedom = variance**2 / spread if spread else float(images - 1)
    error = math.sqrt(variance / (seeds * images))
    return Mean(float(whole), error, float(freedom), seeds, images)


def difference(
    ours: Mapping[int, np.ndarray], theirs: Mapping[int, np.ndarray]
) -> Mean | None:
    """Returns the mean difference of two methods on a task, paired by seed and image.

    Args:
      ours: which images are right, by seed.
      theirs: the same of the other method.

    Returns:
      In points; None if they have no seed in common.
    """
    same = sorted(ours.keys() & theirs.keys())
    if not same:
        return None
    gaps = [np.asarray(ours[s], float) - np.asarray(theirs[s], float) for s in same]
    return mean(np.stack(gaps))


def over_tasks(means: Sequence[Mean]) -> Mean:
    """Returns the mean over these tasks, which are no sample of others.

    >>> a, b = Mean(2.0, 3.0, 10.0, 3, 50), Mean(4.0, 4.0, 10.0, 3, 70)
    >>> over_tasks([a, b]).value, over_tasks([a, b]).error  # sqrt(9 + 16) / 2
    (3.0, 2.5)
    """
    count = len(means)
    parts = [(own.error / count) ** 2 for own in means]
    variance = sum(parts)
    spread = sum(p**2 / own.freedom for p, own in zip(parts, means, strict=True))
    images = sum(own.images for own in means)
    freedom = variance**2 / spread if spread else float(images - count)
    value = sum(own.value for own in means) / count
    fewest = min(own.seeds for own in means)
    return Mean(value, math.sqrt(variance), freedom, fewest, images)


def signs(gaps: Sequence[float]) -> dict[str, float | int | None]:
    """Returns a two-sided sign test over tasks; ties count for neither.

    >>> signs([1.0, 0.5, 2.0, -0.1, 0.0])
    {'wins': 3, 'losses': 1, 'ties': 1, 'p': 0.625}
    """
    wins, losses = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    p = stats.binomtest(wins, wins + losses).pvalue if wins + losses else None
    ties = len(gaps) - wins - losses
    return {
        "wins": wins,
        "losses": losses,
        "ties": ties,
        "p": None if p is None else float(p),
    }


def ranks(accuracies: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Returns the mean rank of each method over tasks, 1 for the best; ties share.

    Args:
      accuracies: of each method on each task, on the same tasks for all.

    >>> ranks({"a": [90.0, 80.0], "b": [80.0, 80.0], "c": [70.0, 60.0]})
    {'a': 1.25, 'b': 1.75, 'c': 3.0}
    """
    if not accuracies:
        return {}
    table = -np.array(list(accuracies.values()))
    means = stats.rankdata(table, axis=0).mean(1)
    return dict(zip(accuracies, means.tolist(), strict=True))


def critical(methods: int, tasks: int) -> float | None:
    """Returns the difference of mean ranks that is significant at 5%; None: few tasks.

    Nemenyi's, as by Demšar (JMLR 7, 2006).
    """
    if tasks < FEWEST or methods < 2:
        return None
    q = float(stats.studentized_range.ppf(LEVEL, methods, np.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * tasks))


def pairs(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Returns all pairs of methods, each once, the later one first.

    >>> pairs(["a", "b", "c"])
    [('b', 'a'), ('c', 'a'), ('c', 'b')]
    """
    return [(later, first) for first, later in itertools.combinations(methods, 2)]
