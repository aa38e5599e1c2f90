"""A language model of one layer through the trainer, in batches of several lengths."""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.data.buckets import Buckets
from experiments.data.tokens import Examples
from experiments.training import evaluation, sharding
from experiments.training.checkpoints import Checkpoints
from experiments.training.objective import Metric
from experiments.training.recipe import Recipe
from experiments.training.trainer import Data, Trainer

VOCABULARY = 11
RECIPE = Recipe(epochs=1, steps=10, round_steps=4, batch=4, lr=0.1)
BUCKETS = Buckets((4, 8), pad=0, evaluated=8)


class Bigram(nnx.Module):
    """Predicts a token from the one before it."""

    def __init__(self, rngs):
        self.table = nnx.Embed(VOCABULARY, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        return self.table(tokens)


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Objective of the mean loss of the tokens that are learnt."""

    metrics = (Metric("perplexity", more_is_better=False),)
    score = None

    def loss(self, model, batch, key):
        sums = self.sums(self.outputs(model, batch), batch)
        return sums["loss"] / sums["count"]

    def outputs(self, model, batch):
        logits, next_ = model(batch["tokens"])[:, :-1], batch["tokens"][:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, next_)
        return (losses * batch["loss"][:, 1:]).sum(-1)

    def sums(self, outputs, batch):
        return {"loss": outputs.sum(), "count": batch["loss"][:, 1:].sum()}

    def numbers(self, sums):
        return {"perplexity": float(np.exp(sums["loss"] / sums["count"]))}

    def draw(self, axes, example, output):
        raise NotImplementedError


def examples(count, seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 9, count)
    tokens = [rng.integers(1, VOCABULARY, size).astype(np.int32) for size in sizes]
    return Examples(tokens, [size - 2 for size in sizes], range(count))


TRAIN, FOLLOWED = examples(15, 0), examples(13, 1)


def trained(folder, rounds=None):
    objective = NextToken()
    with contextlib.closing(Checkpoints(folder, objective.metrics[0])) as saved:
        trainer = Trainer(
            Bigram(nnx.Rngs(0)),
            Data(TRAIN, FOLLOWED, BUCKETS, BUCKETS),
            objective,
            RECIPE,
            sharding.make("data=2"),
            checkpoints=saved,
        )
        with contextlib.closing(trainer):
            rows = list(itertools.islice(trainer.train(lambda _: None), rounds))
            state = jax.tree.map(np.array, jax.tree.leaves(trainer.state))
            return rows, state, trainer.model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("whole"))


def test_metrics_are_those_of_every_example_alone(whole):
    rows, _, model = whole
    table = np.float64(model.table.embedding[...])
    logs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    losses = [
        -logs[one, other]
        for tokens in FOLLOWED.tokens
        for one, other in itertools.pairwise(tokens[-3:])
    ]
    expected = np.exp(np.mean(losses))
    assert rows[-1].metrics["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert [row.updates for row in rows] == [4, 8, 10]
    assert rows[-1].train_loss < rows[0].train_loss


def test_a_run_goes_on_in_the_midst_of_an_epoch_bit_for_bit(whole, tmp_path):
    rows, state, _ = whole
    for rounds in (2, None):  # the second round was not yet saved
        some, now, _ = trained(tmp_path, rounds)
        for row in some:
            same = rows[row.number - 1]
            assert (row.train_loss, row.metrics) == (same.train_loss, same.metrics)
    assert [row.number for row in some] == [2, 3]
    for one, other in zip(now, state, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_evaluation_has_as_many_examples_a_batch_as_the_buckets_say():
    batches = evaluation.batches(FOLLOWED, BUCKETS, sharding.make("data=2"))
    shapes = {jnp.shape(batch["tokens"]) for batch in batches}
    assert shapes == {(8, 4), (8, 8)}
