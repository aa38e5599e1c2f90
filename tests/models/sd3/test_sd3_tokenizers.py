"""Tokenizers of text encoders: against a slow BPE, SentencePiece and transformers."""

import gzip
import io
import itertools
import json
import re
import sys

import numpy as np
import pytest
import sentencepiece
import vocabularies
from texts import AWKWARD

from snella_jax.files.errors import CheckpointError
from snella_jax.models.sd3 import tokenizers

LINES = ["t h", "th e</w>", "c a", "ca t</w>", "1 2</w>", "' s</w>", "i n", "in g</w>"]
HEADER = '"bpe_simple_vocab_16e6.txt#version: 0.2\n'
TEXTS = {
    **AWKWARD,
    "upper case": "The CAT's THING, Ing",
    "entity": "cats &amp; dogs &lt;3 &#39;",
    "start and end": "a <|endoftext|> b<|startoftext|>",
    "upper case end": "<|ENDOFTEXT|>",
    "accents": "É È ÇA ẞ ǅ",
    "exclamations": "a cat! the cat !!",
    "too long": "cat " * 100,
}


@pytest.fixture(scope="module")
def merges(tmp_path_factory):
    path = tmp_path_factory.mktemp("merges") / "bpe.txt.gz"
    path.write_bytes(gzip.compress((HEADER + "\n".join(LINES) + "\n").encode()))
    return path


def slow(words):
    """Returns tokens of ASCII words by CLIP's definition, a merge at a time."""
    ranks = {tuple(line.split()): rank for rank, line in enumerate(LINES)}
    found = []
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while pairs := [p for p in itertools.pairwise(parts) if p in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            at = list(itertools.pairwise(parts)).index(best)
            parts[at : at + 2] = ["".join(best)]
        found += parts
    return found


def test_ids_follow_from_the_merges(merges):
    """256 bytes, the same at a word's end, the merges, start and end."""
    tokenizer = tokenizers.clip_tokenizer(merges)
    assert (tokenizer.size, tokenizer.start, tokenizer.end) == (522, 520, 521)
    assert tokenizer.encode("") == [520, 521]
    letters = {chr(33 + n): n for n in range(94)}  # of ASCII
    ids = {**letters, **{f"{c}</w>": 256 + n for c, n in letters.items()}}
    ids |= {line.replace(" ", ""): 512 + n for n, line in enumerate(LINES)}
    words = ["the", "cat", "'s", "thing", "1", "2", "1", "!!", "cathe"]
    text = "  The CAT's\n\tTHING 12 1!! cathe "
    expected = [ids[token] for token in slow(words)]
    assert tokenizer.to_ids(text) == expected
    assert tokenizer.encode(text) == [520, *expected, 521]


def test_rows_are_filled_and_cut(merges, caplog):
    tokenizer = tokenizers.clip_tokenizer(merges)
    cat = 512 + LINES.index("ca t</w>")
    rows = tokenizer.padded(["a cat", "cat " * 9], length=6)
    assert rows.dtype == np.int32
    assert rows.tolist() == [[520, 256 + 64, cat, 521, 521, 521],
                             [520, cat, cat, cat, cat, 521]]  # fmt: skip
    assert "has 9 tokens, of which the first 4 are read: 'cat cat" in caplog.text
    rows = tokenizer.padded(["cat"], pad=0)
    assert rows.shape == (1, 77) and rows[0, :4].tolist() == [520, cat, 521, 0]
    with pytest.raises(TypeError, match="expected a list of texts"):
        tokenizer.padded("cat")
    with pytest.raises(ValueError, match="length=1: expected room"):
        tokenizer.encode("cat", 1)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("\ud800")


def test_merges_that_are_cut_off_are_refused(merges, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "MERGES", len(LINES))
    _, ids, _ = tokenizers._vocabulary(merges)
    (tmp_path / "vocab.json").write_text(json.dumps(ids), "utf-8")
    lines = "\n".join(["#version: 0.2", *LINES[:-2]])
    (tmp_path / "merges.txt").write_text(lines, "utf-8")
    with pytest.raises(CheckpointError, match=r"no merge makes 2 of .* are cut off"):
        tokenizers.clip_tokenizer(tmp_path)


@pytest.mark.parametrize("pairs", [True, False])
def test_folders_give_the_same(pairs, merges, tmp_path):
    """`vocab.json` and `merges.txt`, and the two forms of `tokenizer.json`."""
    tokenizer = tokenizers.clip_tokenizer(merges)
    _, ids, split = tokenizers._vocabulary(merges)
    both, one = tmp_path / "both", tmp_path / "one"
    both.mkdir()
    one.mkdir()
    (both / "vocab.json").write_text(json.dumps(ids), "utf-8")
    (both / "merges.txt").write_text("#version: 0.2\n" + "\n".join(LINES), "utf-8")
    model = {"vocab": ids, "merges": [list(m) for m in split] if pairs else LINES}
    (one / "tokenizer.json").write_text(json.dumps({"model": model}), "utf-8")
    for path in (both, one, one / "tokenizer.json"):
        other = tokenizers.clip_tokenizer(path, length=5)
        assert (other.size, other.start, other.end) == (522, 520, 521)
        assert other.length == 5
        for text in TEXTS.values():
            assert other.encode(text, 77) == tokenizer.encode(text, 77)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt.gz", gzip.compress(HEADER.encode(), mtime=0)[:30], "damaged"),
        ("a.txt", b"<html>", "it is a web page: log in"),
        ("a.txt", b"a b", "no merges: it begins with 'a b'"),
        ("a.txt", b"#version: 0.2\na b\nc\n", "line 3 is 'c': expected two parts"),
        ("a.txt", b"#version: 0.2\nab cd\n", "damaged .*ab"),
        ("a.json", b"{}", "expected the vocabulary of a BPE"),
        ("a.json", b'{"model": {"vocab": {"a": 0}, "merges": []}}',
         r"no CLIP's: it has no <\|startoftext\|> and no <\|endoftext\|>"),
        ("a.json", b'{"model"', "damaged"),
    ],
)  # fmt: skip
def test_damaged_merges(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        tokenizers.clip_tokenizer(tmp_path / name)


def test_missing_files_and_packages(merges, tmp_path, monkeypatch):
    for load in (tokenizers.clip_tokenizer, tokenizers.t5_tokenizer):
        with pytest.raises(FileNotFoundError, match="There is no tokenizer at"):
            load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"neither vocab.json and merges.txt"):
        tokenizers.clip_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="none of spiece"):
        tokenizers.t5_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"snella-jax\[generation\]"):
        tokenizers.clip_tokenizer(merges)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="--no-deps open-clip-torch"):
        tokenizers.clip_tokenizer()


def t5_pieces(**options):
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(vocabularies.LINES),
        model_writer=made,
        vocab_size=80,
        model_type="unigram",
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, **options},
    )
    return made.getvalue()


def test_t5(tmp_path):
    """Of `spiece.model`, and of the same as a `tokenizer.json`."""
    import tokenizers as package

    proto = t5_pieces()
    (tmp_path / "spiece.model").write_bytes(proto)
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    tokenizer = tokenizers.t5_tokenizer(tmp_path)
    assert (tokenizer.size, tokenizer.start, tokenizer.end) == (80, None, 1)
    for text in AWKWARD.values():
        assert tokenizer.encode(text) == [*model.encode(text)[:255], 1]
    ids = model.encode("the cat")
    rows = tokenizer.padded(["the cat", ""], length=12)
    filled = [*ids, 1, *[0] * (11 - len(ids))]
    assert rows.tolist() == [filled, [1, *[0] * 11]]

    scores = [(model.id_to_piece(i), model.get_score(i)) for i in range(80)]
    backend = package.Tokenizer(package.models.Unigram(scores, unk_id=2))
    backend.pre_tokenizer = package.pre_tokenizers.Metaspace()
    backend.enable_truncation(2)
    backend.enable_padding(length=99)
    backend.save(str(tmp_path / "tokenizer.json"))
    other = tokenizers.t5_tokenizer(tmp_path / "tokenizer.json", length=12)
    assert other.padded(["the cat", ""]).tolist() == rows.tolist()
    assert other.size == 80


def test_no_t5(tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(t5_pieces(pad_id=-1, bos_id=0))
    with pytest.raises(CheckpointError, match="its padding is -1 and its end 1"):
        tokenizers.t5_tokenizer(path)
    path.write_bytes(t5_pieces()[:500])
    with pytest.raises(CheckpointError, match="damaged"):
        tokenizers.t5_tokenizer(path)
    (tmp_path / "a.json").write_text("{}", "utf-8")
    with pytest.raises(CheckpointError, match="damaged"):
        tokenizers.t5_tokenizer(tmp_path / "a.json")


@pytest.mark.reference
def test_ids_are_those_of_transformers(tmp_path):
    """Built from the merges in `open-clip-torch`, which is not imported for them."""
    transformers = pytest.importorskip("transformers")

    tokenizer = tokenizers.clip_tokenizer()
    _, ids, merges = tokenizers._vocabulary(tokenizers._open_clip())
    oracle = transformers.CLIPTokenizer(vocab=ids, merges=merges)
    assert (tokenizer.size, tokenizer.start, tokenizer.end) == (49408, 49406, 49407)
    for name, text in TEXTS.items():
        expected = oracle(text, truncation=True, max_length=77).input_ids
        assert tokenizer.encode(text) == expected, name
        expected = oracle(text, add_special_tokens=False).input_ids
        assert tokenizer.to_ids(text) == expected, name
    oracle.save_pretrained(tmp_path)
    again = tokenizers.clip_tokenizer(tmp_path)
    assert all(again.encode(t) == tokenizer.encode(t) for t in TEXTS.values())
    short = [text for text in TEXTS.values() if not re.search("endoftext", text)]
    rows = oracle(short, truncation=True, max_length=77, padding="max_length").input_ids
    assert tokenizer.padded(short).tolist() == rows
    assert tokenizer.padded(["a cat!"], 7, 0).tolist() == [
        [49406, 320, 2368, 256, 49407, 0, 0]
    ]


@pytest.mark.reference
def test_t5s_ids_are_those_of_transformers(tmp_path):
    """But where a text has control characters or names tokens, which pieces do not."""
    transformers = pytest.importorskip("transformers")

    (tmp_path / "spiece.model").write_bytes(t5_pieces())
    oracle = transformers.T5Tokenizer.from_pretrained(tmp_path)
    oracle.save_pretrained(tmp_path / "json")
    pieces = tokenizers.t5_tokenizer(tmp_path, length=50)
    whole = tokenizers.t5_tokenizer(tmp_path / "json", length=50)
    for name, text in TEXTS.items():
        expected = oracle(text, truncation=True, max_length=50).input_ids
        assert whole.encode(text) == expected, name
        if name not in ("controls", "special tokens"):
            assert pieces.encode(text) == expected, name
