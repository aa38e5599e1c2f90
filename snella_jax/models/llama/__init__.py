"""LLaMA: tokenizers of its files."""

from snella_jax.models.llama.tokenizer import tokenizer
from snella_jax.models.llama.vocabulary import Tokenizer

__all__ = ["Tokenizer", "tokenizer"]
