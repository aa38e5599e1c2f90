"""Small vocabularies in every format, trained on a few lines."""

import base64
import io
import json

import gguf
import sentencepiece
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

LINES = [
    "The quick brown fox jumps over the lazy dog, the cat sat on the mat. ",
    "Question: which is the correct answer?  Answer1: the moon Answer2: the sun\n\n",
    "    return x**2  # squared, and it's said that there're 1234567890 of them\n",
    "中文分词测试 é ü 👩‍👩‍👧 in the other 12 34 567 lines",
] * 20
LLAMA3_PATTERN = (  # Meta's, as transformers has it too
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def pieces():
    """Returns the bytes of a SentencePiece model with the settings of LLaMA's."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=made,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return made.getvalue()


def bpe(how):
    """Returns a trained byte-level backend that cuts texts as `how` does."""
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        {
            "gpt-2": [byte_level(add_prefix_space=False)],
            "smollm": [
                pre_tokenizers.Digits(individual_digits=True),
                byte_level(add_prefix_space=False),
            ],
            "llama-bpe": [
                pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
                byte_level(add_prefix_space=False, use_regex=False),
            ],
        }[how]
    )
    backend.decoder = decoders.ByteLevel()
    special = [] if how == "llama-bpe" else SPECIAL
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=special,
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    return backend


def json_folder(folder, backend, bos=None, **config):
    """Writes a folder of Hugging Face; with `bos`, texts begin with that token."""
    folder.mkdir()
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    backend.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), "utf-8")
    return folder


def llama_gguf(path):
    """Returns the writer of a GGUF without tensors, of a LLaMA that has no layer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    return writer


def saved(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_of_bpe(path, backend, how):
    """Writes the vocabulary of a backend of `bpe(how)`."""
    writer = llama_gguf(path)
    inside = json.loads(backend.to_str())["model"]
    tokens = sorted(inside["vocab"], key=inside["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(how)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in inside["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    saved(writer)
    return path


def gguf_of_pieces(path, proto, **values):
    """Writes the vocabulary of a SentencePiece model, as llama.cpp's converter does."""
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    ids = range(model.vocab_size())
    kinds = [
        2
        if model.is_unknown(i)
        else 3
        if model.is_control(i)
        else 6
        if model.is_byte(i)
        else 1
        for i in ids
    ]
    writer = llama_gguf(path)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(i) for i in ids])
    writer.add_token_scores([model.get_score(i) for i in ids])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in values.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    saved(writer)
    return path


def ranks_file(path, backend):
    """Writes Llama 3's format from a backend of `bpe("llama-bpe")`."""
    # GPT-2's letters for bytes: printable ones stand for themselves, others from 256.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]
    letters |= {chr(256 + n): byte for n, byte in enumerate(others)}
    lines = []
    for token, rank in sorted(backend.get_vocab().items(), key=lambda item: item[1]):
        data = bytes(letters[letter] for letter in token)
        lines.append(f"{base64.b64encode(data).decode()} {rank}\n")
    path.write_text("".join(lines), "utf-8")
    return path
