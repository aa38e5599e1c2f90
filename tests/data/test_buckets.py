"""Batches of texts of like length: order, padding, shards, resume, devices."""

import itertools
import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.data import pipeline
from experiments.data.buckets import Buckets
from experiments.data.pipeline import Reading, Shard
from experiments.data.tokens import Examples

SIZES = np.random.default_rng(0).integers(3, 33, 61)
TOKENS = [
    np.arange(100 * i + 1, 100 * i + 1 + n, dtype=np.int32) for i, n in enumerate(SIZES)
]
SOURCE = Examples(TOKENS, [n - 2 for n in SIZES], range(61))
BUCKETS = Buckets((8, 16, 33), pad=0)


def stream(**options):
    options = {"batch": 4, "epochs": 3, "seed": 0, **options}
    return pipeline.training(SOURCE, BUCKETS, **options)


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def check(batch, rows, valid):
    """Every row is its example, padded."""
    length = batch["tokens"].shape[1]
    assert length in BUCKETS.lengths
    assert [batch[n].dtype for n in ("tokens", "mask", "loss", "index")] == [
        *(np.int32, bool, bool, np.int32)
    ]
    for place in np.flatnonzero(valid):
        own, size = TOKENS[rows[place]], SIZES[rows[place]]
        padded = [*own, *[0] * (length - size)]
        assert batch["tokens"][place].tolist() == padded
        assert np.flatnonzero(batch["mask"][place]).tolist() == list(range(size))
        assert np.flatnonzero(batch["loss"][place]).tolist() == [size - 2, size - 1]


def test_an_epoch_has_every_example_at_most_once_in_batches_of_like_length():
    batches = list(stream())
    assert len(batches) == 3 * 15  # 61 // 4, as of images
    orders, left_out = [], []
    for start in (0, 15, 30):
        epoch = batches[start : start + 15]
        for batch in epoch:
            check(batch, batch["index"], np.ones(4, bool))
        rows = np.concatenate([batch["index"] for batch in epoch])
        assert len(set(rows.tolist())) == 60
        orders.append(rows.tolist())
        left_out += set(range(61)) - set(rows.tolist())
        lengths = [batch["tokens"].shape[1] for batch in epoch]
        assert lengths != sorted(lengths)
        # A bucket's last few are padded to the next one's length, and no others.
        for length, shorter in zip(BUCKETS.lengths[1:], BUCKETS.lengths, strict=False):
            inside = [
                SIZES[b["index"]] for b in epoch if b["tokens"].shape[1] == length
            ]
            assert (np.concatenate(inside) <= shorter).sum() < 4
    assert orders[0] != orders[1] != orders[2] and len(set(left_out)) > 1


def test_the_seed_decides():
    same(next(iter(stream())), next(iter(stream())))
    first, other = ([b["index"] for b in stream(seed=s)] for s in (0, 1))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("step", "workers"), [(0, 0), (7, 0), (15, 0), (44, 0), (8, 2)]
)
def test_a_resumed_stream_goes_on_bit_for_bit(step, workers):
    whole, reading = list(stream()), Reading(workers=workers)
    begun = iter(stream(reading=reading))
    for _ in range(step):
        next(begun)
    state = json.loads(json.dumps(begun.get_state()))  # it goes into a checkpoint
    if not workers:
        assert state["next_index"] == step
    resumed = iter(stream(reading=reading))
    resumed.set_state(state)
    rest = list(resumed)
    assert len(rest) == len(whole) - step
    for one, other in zip(rest, whole[step:], strict=True):
        same(one, other)


def test_shards_make_up_the_batches_of_one_process():
    whole = list(stream())
    shards = [list(stream(shard=Shard(i, 2))) for i in range(2)]
    for batch, *parts in zip(whole, *shards, strict=True):
        for part, start in zip(parts, (0, 1), strict=True):
            same(part, {name: batch[name][start::2] for name in batch})


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_sees_every_example_once(count):
    seen, shapes = [], []
    for index in range(count):
        batches = list(
            pipeline.evaluation(SOURCE, BUCKETS, batch=8, shard=Shard(index, count))
        )
        shapes.append([batch["tokens"].shape for batch in batches])
        for batch in batches:
            check(batch, batch["index"], batch["valid"])
            fillers = ~batch["valid"]
            assert not batch["loss"][fillers].any()
            assert (batch["mask"][fillers].sum(-1) == 1).all()
            seen += batch["index"][batch["valid"]].tolist()
    assert sorted(seen) == list(range(61))
    assert shapes[0] == shapes[-1] and {s[0] for s in shapes[0]} == {8 // count}


def test_batches_of_several_lengths_go_to_devices():
    mesh = jax.make_mesh((4,), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    for one, other in zip(
        pipeline.to_devices(stream(), sharding), stream(), strict=True
    ):
        assert one["tokens"].sharding == sharding
        same(jax.tree.map(np.asarray, one), other)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_lengths_make_the_least_padding(count):
    """Against every choice of so many multiples of 8."""
    found = Buckets.of(SIZES, count, pad=0).lengths

    def tokens(lengths):
        return sum(min(n for n in lengths if n >= size) for size in SIZES)

    every = itertools.combinations(range(8, 41, 8), count)
    most = -(-max(SIZES) // 8) * 8
    assert tokens(found) == min(tokens(c) for c in every if c[-1] >= most)
    assert found[-1] == most and all(length % 8 == 0 for length in found)


def test_lengths():
    assert Buckets.of([7] * 9, 4, pad=0).lengths == (8,)
    for lengths in ((), (8, 8), (16, 8), (1, 8)):
        with pytest.raises(
            ValueError, match="expected different numbers from 2, rising"
        ):
            Buckets(lengths, 0)
    with pytest.raises(ValueError, match="has 32 tokens: expected at most 16"):
        pipeline.training(SOURCE, Buckets((8, 16), 0), batch=4, epochs=1, seed=0)
