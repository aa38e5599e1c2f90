"""The LLaMA: the model, its presets, published weights for it, and tokenizers."""

from snella_jax.models.llama.config import PRESETS, LlamaConfig
from snella_jax.models.llama.generate import generate
from snella_jax.models.llama.model import Llama, create
from snella_jax.models.llama.rotary import Llama3Scaling
from snella_jax.models.llama.tokenizer import tokenizer
from snella_jax.models.llama.vocabulary import Tokenizer
from snella_jax.models.llama.weights import FAMILY, load

__all__ = [
    "FAMILY",
    "PRESETS",
    "Llama",
    "Llama3Scaling",
    "LlamaConfig",
    "Tokenizer",
    "create",
    "generate",
    "load",
    "tokenizer",
]
