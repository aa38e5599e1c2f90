"""Answers of a language model: loss, labels, likelihoods and perplexity by loops."""

import json

import asked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from words import Words

from experiments import terminal
from experiments.data import questions
from experiments.data.prompts import TEMPLATES
from experiments.data.questions import AnswerBuckets, Asked, Reading
from experiments.data.records import Record
from experiments.training import (
    choice_scores,
    evaluation,
    generated,
    likelihood,
    sharding,
)
from experiments.training.answers import Answers
from experiments.training.choice_scores import Choice, Choices
from snella_jax.models import llama

PLAIN = TEMPLATES["plain"]
SIZES = {"width": 16, "depth": 2, "heads": 2, "kv_heads": 1, "head_dim": 8}
ONE = "data=1"


@pytest.fixture(scope="module")
def model():
    sizes = SIZES | {"vocab_size": 200, "mlp_dim": 24}
    return llama.create("smollm2_135m", rngs=nnx.Rngs(0), **sizes)


def read(folder, encoder, **options):
    return questions.load(
        asked.folder(folder), encoder, Reading(PLAIN, validation=4, **options)
    )


def log_probabilities(model, tokens):
    """Of one text alone, in float64."""
    logits = np.float64(model(jnp.asarray(tokens)[None])[0])
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def batch_of(source, rows, **options):
    buckets = AnswerBuckets.fitting(source, 1, pad=0, evaluated=4)
    group = questions.Group(buckets.lengths[-1], np.asarray(rows))
    return {n: jnp.asarray(x) for n, x in buckets.collated(source, group).items()}


@pytest.mark.parametrize("learnt", ["answer", "all"])
def test_the_loss_is_the_mean_over_the_learnt_tokens(learnt, model, tmp_path):
    task = read(tmp_path, Words(), learnt=learnt)
    batch = batch_of(task.train, [3, 0, 7])
    found = Answers(task.names).loss(model, batch, jax.random.key(0))
    losses = []
    for row in (3, 0, 7):
        tokens = task.train.tokens[row]
        scores = log_probabilities(model, tokens)
        start = len(tokens) - 6 if learnt == "answer" else 1  # the correct answer is X.
        losses += [-scores[t - 1, tokens[t]] for t in range(start, len(tokens))]
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize("places", [0, 2])
def test_a_batch_without_a_learnt_token_has_no_loss(places, model, tmp_path):
    task = read(tmp_path, Words())
    batch = batch_of(task.train, [3, 0]) | {"learnt": jnp.zeros((2, places), int)}
    assert Answers(task.names).loss(model, batch, None) == 0


def test_labels_losses_and_the_mean_of_the_tests(model, tmp_path):
    """Of questions of two tests and lengths, in batches that are filled up."""
    encoder, hits, losses = Words(), {}, []
    task = read(tmp_path, encoder)
    for own, tokens in zip(task.test.asked, task.test.examples.tokens, strict=True):
        scores, record = log_probabilities(model, tokens), own.record
        names = record.instruction.split("Answer format: ")[1].split("/")
        place = len(tokens) - 2  # the label is one word, before the end
        each = [scores[place - 1, encoder.known[f" {name}"]] for name in names]
        hit = names[int(np.argmax(each))] == record.answer
        hits.setdefault(task.names[own.test], []).append(hit)
        losses += [-scores[t - 1, tokens[t]] for t in range(place - 4, len(tokens))]
    buckets = AnswerBuckets.fitting(task.test, 2, pad=0, evaluated=4)
    objective = Answers((*task.names, "nothing of it"))
    where = task.test, buckets, sharding.make("data=2"), objective
    found = evaluation.evaluate(model, *where).metrics
    expected = {f"accuracy_{test}": np.mean(own) for test, own in hits.items()}
    expected |= {"accuracy": np.mean(list(expected.values())), "loss": np.mean(losses)}
    assert found == pytest.approx(expected, rel=1e-5)
    assert len({*map(len, task.test.examples.tokens)}) > 1


def test_perplexity_counts_every_token_once(model):
    tokens = np.random.default_rng(0).integers(0, 200, 21).tolist()
    windows = likelihood.windows(tokens, length=8, stride=3)
    buckets = AnswerBuckets.fitting(windows, 1, pad=0, evaluated=4)
    found = likelihood.perplexity(model, windows, buckets, sharding.make(ONE))
    losses = []
    for place in range(1, 21):
        # The window that counts it: the first eight tokens, then three more a window.
        begin = 0 if place < 8 else 3 * ((place - 8) // 3 + 1)
        seen = log_probabilities(model, tokens[begin : place + 1])
        losses.append(-seen[place - begin - 1, tokens[place]])
    assert found == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


def test_texts_are_scored_behind_the_question_without_its_choices(model, tmp_path):
    encoder = Words()
    task = read(tmp_path, encoder)
    made = Choices.of(task.test, task.names, encoder, pad=0, batch=4)
    found = choice_scores.measured(model, made, sharding.make(ONE))
    hits = {(score, test): [] for score in choice_scores.SCORES for test in task.tests}
    for own in task.test.asked:
        question, _, rest = own.record.instruction.partition("\n\n")
        if task.names[own.test] == "sums":
            texts = [part.split()[1] for part in rest.split("Answer")[1:4]]
        else:
            texts = ["true", "false"]
        before = encoder.encode(f"{question}\nAnswer:")
        sums = []
        for text in texts:
            tokens = [*before, encoder.known[f" {text}"]]
            sums.append(log_probabilities(model, tokens)[-2, tokens[-1]])
        names = own.record.instruction.split("Answer format: ")[1].split("/")
        for score in choice_scores.SCORES:
            norm = [len(text) for text in texts] if score == "text_norm" else 1
            hit = names[int(np.argmax(np.divide(sums, norm)))] == own.record.answer
            hits[score, task.names[own.test]].append(hit)
    for (score, test), each in hits.items():
        assert found[f"test_{score}_{test}"] == pytest.approx(np.mean(each)), score
    assert found["unparsed"] == {"larger": 0, "sums": 0}


def test_choices_of_several_tokens_and_lengths():
    """Sums and means over characters may differ in what is best; ties: the first."""
    choices = [
        *(Choice(3, right, n) for right, n in ((True, 10), (False, 2))),
        *(Choice(5, right, 4) for right in (False, True)),
    ]
    given = Choices(None, None, choices, {3: "a", 5: "b"}, {})
    found = choice_scores.accuracies(np.array([-9.0, -4.0, -1.0, -1.0]), given)
    assert found == {
        **{"test_text_a": 0.0, "test_text_b": 0.0, "test_text": 0.0},
        **{"test_text_norm_a": 1.0, "test_text_norm_b": 0.0, "test_text_norm": 0.5},
    }


def test_generated_answers_are_the_first_keyword(tmp_path):
    task = read(tmp_path, Words())
    prompts = []

    def write(given):
        prompts.extend(given)
        # The right one for `sums`, in another case or not at all for `larger`.
        texts = ["It is True.", "?", " false or true", "false", "true"]
        names = [own.record.answer for own in task.test.asked[5:]]
        return texts + [f" so {name}, not answer1 answer2" for name in names]

    found = generated.measured(task.test.asked, task.names, PLAIN, write)
    answers = [own.record.answer for own in task.test.asked[:5]]
    hits = np.equal(answers[2:], ["false", "false", "true"])
    assert found["test_generated_larger"] == pytest.approx(hits.sum() / 5)
    assert 0 < hits.sum() < 3
    assert found["test_generated_sums"] == 1.0
    assert found["keywordless"] == {"larger": 2, "sums": 0}
    assert all(prompt.endswith("Response:") for prompt in prompts)


def test_a_writer_writes_behind_each_prompt_by_itself(model, tmp_path):
    """In batches of prompts of several lengths, in their order."""
    encoder, prompts = Words(), ["a b c", "a b c d e f g", "h"]
    encoder.pad = 0
    ids = [encoder.encode(prompt) for prompt in prompts]
    encoder.known |= {f" w{n}": n for n in range(30, 200)}
    how = {"max_new_tokens": 32, "eos": (2,), "beams": 4}
    alone = [llama.generate(model, jnp.asarray([own]), **how)[0] for own in ids]
    expected = [encoder.decode(own) for own in alone]
    shown = terminal.console()
    assert generated.writer(model, encoder, 2, shown)(prompts) == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize(
    ("labels", "text", "expected"),
    [
        ("answer1/answer2", " the correct answer is answer2", "answer2"),
        ("answer1/answer2", "Answer1 answer5 answer1", "answer5"),  # one of its test's
        ("answer1/answer2", "answer22", "answer2"),
        ("answer1/answer2", "it\n\nResponse: answer1", None),
        ("true/false", "answer1", None),
        ("b/a", "a or b", "a"),
        ("a/ab", "ab", "ab"),
        ("answer1/answer6", "answer5 answer6", "answer6"),
    ],
)
def test_keywords_are_those_of_the_published_tests_or_the_labels(
    labels, text, expected
):
    first = labels.split("/")[0]
    own = Record(f"Which?\n\nAnswer format: {labels}", "", first, first)
    assert generated.answer_of(text, generated.keywords(own), "Response:") == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_behind_another_mark_is_not_looked_at(name):
    own = record(["a", "b"], "a")
    mark = {"plain": "Response:", "llm_adapters": "### Response:"}[name]
    for text, hit in ((f"a {mark} b", 1.0), (f"it {mark} a", 0.0)):
        found = generated.measured(
            [own], ["mine"], TEMPLATES[name], lambda prompts, text=text: [text]
        )
        assert found["test_generated_mine"] == hit


def test_a_question_without_room_for_its_answer_is_told_before():
    own, encoder = record(["a", "b"], "a"), Letters()
    longest = len(PLAIN.asked(own.record))
    generated.check([own], PLAIN, encoder, longest + 32)
    with pytest.raises(ValueError, match=f"has {longest} tokens, its answer 32: .*=40"):
        generated.check([own], PLAIN, encoder, 40)


# Records and their splits


class Letters:
    """A tokenizer with a token a letter."""

    eos = 2

    def encode(self, text, bos=None):
        return [ord(letter) for letter in text]


def record(names, answer, output="it is {}"):
    instruction = f"Which?\n\nAnswer format: {'/'.join(names)}"
    return Asked(Record(instruction, "", output.format(answer), answer), 0, "x.json, 4")


def test_candidates_differ_where_their_tokens_do_first():
    """Behind `answer`, of which they share the letters; one may end before."""
    own = record(["answer1", "answer2", "answer"], "answer2")
    at, tokens, label = questions.candidates(own, Letters(), PLAIN)
    text = PLAIN.whole(own.record)
    assert text[:at].endswith("it is answer") and text[at] == "2"
    assert (tokens, label) == ([ord("1"), ord("2"), Letters.eos], 1)


@pytest.mark.parametrize(
    ("names", "answer", "output", "said"),
    [
        (["aa", "ab", "b"], "b", "it is {}", "aa, ab, b do not differ pairwise in"),
        (["a", "b"], "c", "it is {}", "'c' among them"),
        (["a", "b"], "a", "no", "'no' is without its answer 'a'"),
    ],
)
def test_what_has_no_candidates_is_named(names, answer, output, said):
    with pytest.raises(ValueError, match=f"x.json, 4: .*{said}"):
        questions.candidates(record(names, answer, output), Letters(), PLAIN)


def test_splits_are_disjoint_and_the_same_for_every_run(tmp_path):
    made = [read(tmp_path, Words(), limit=4, tests=("sums",)) for _ in range(2)]
    for task in made:
        assert task.tests == ("sums",) and len(task.test) == 4
        answers = [own.record.answer for own in task.test.asked]
        most = max(answers.count(answer) for answer in answers)
        assert task.majority == {"sums": most / 4} and most == 2  # of all six: a third
        assert len(task.train) == 20 and len(task.validation) == 4
    ids = [{tuple(x) for x in own.train.tokens} for own in made]
    followed = {tuple(x) for x in made[0].validation.examples.tokens}
    assert ids[0] == ids[1] and made[0].fingerprint == made[1].fingerprint
    assert len(ids[0] | followed) == 24
    with pytest.raises(ValueError, match="has no test of boolq; it has larger, sums"):
        read(tmp_path, Words(), tests=("boolq",))


def test_a_file_of_ten_is_split(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(asked.sums(10)), "utf-8")
    task = questions.load(path, Words(), Reading(PLAIN))
    assert [len(x) for x in (task.train, task.validation, task.test)] == [6, 2, 2]
    path.write_text(json.dumps(asked.sums(2)), "utf-8")
    with pytest.raises(ValueError, match="2 records: expected three or more"):
        questions.load(path, Words(), Reading(PLAIN))
