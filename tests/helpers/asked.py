"""Records of two tests, and a tiny random LLaMA with a tokenizer to answer them."""

import json

import vocabularies
from flax import nnx

from snella_jax.models import export, llama

SUMS = "Please choose the correct answer to the question: What is {} and {}?\n\n"
SUMS += "Answer1: {} Answer2: {} Answer3: {}\n\nAnswer format: answer1/answer2/answer3"
LARGER = "Please answer the following question with true or false, question: is {} "
LARGER += "larger than {}?\n\nAnswer format: true/false"


def sums(count):
    """Returns questions with three choices, of two tokens each."""
    found = []
    for n in range(count):
        a, b, right = n % 7, n % 5, n % 3
        choices = [a + b + 1 + i for i in range(3)]
        choices[right] = a + b
        found.append(_record(SUMS.format(a, b, *choices), f"answer{right + 1}"))
    return found


def larger(count):
    """Returns questions to be answered with true or false."""
    pairs = [(n % 7, 3 * n % 5) for n in range(count)]
    return [_record(LARGER.format(a, b), str(a > b).lower()) for a, b in pairs]


def _record(instruction, answer):
    output = f"the correct answer is {answer}"
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


def folder(path):
    """Writes records of both, the second of which is only tested."""
    for name, split, own in (
        ("sums", "train", sums(24)),
        ("sums", "test", sums(6)[::-1]),
        ("larger", "test", larger(5)),
    ):
        (path / name).mkdir(parents=True, exist_ok=True)
        (path / name / f"{split}.json").write_text(json.dumps(own), "utf-8")
    return path


def language_model(path):
    """Writes a folder of Hugging Face with a random model and a tokenizer."""
    backend = vocabularies.bpe("smollm")
    end = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    vocabularies.json_folder(path / "tokenizer", backend, add_bos_token=False, **end)
    sizes = {"width": 16, "depth": 2, "heads": 2, "kv_heads": 1, "head_dim": 8}
    rngs, size = nnx.Rngs(0), backend.get_vocab_size()
    model = llama.create(
        "smollm2_135m", vocab_size=size, mlp_dim=24, **sizes, rngs=rngs
    )
    export(model, path / "model")
    for file in (path / "tokenizer").iterdir():
        file.rename(path / "model" / file.name)
    return path / "model"
