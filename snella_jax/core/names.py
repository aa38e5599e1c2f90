"""Uses of parameters, as their names tell them.

>>> [name for name in ("pos_embedding", "wq", "layer_scale1") if is_multiplied(name)]
['wq']
"""

import re

# Words in the names of parameters that are added, looked up, or scale channels,
ADDED = re.compile(
    "bias(es)?|beta|scale|gamma|norm|ln|emb|embed(dings?)?|pos|positions?|positional"
    "|posemb|posembed|relpos|tokens?|cls|latents?|probe|prompts?|table|mean|var"
    "|temperature|wte|wpe"
)
# of those that multiply whatever they are called besides,
PRODUCT = re.compile("proj(ection)?|einsum|linear|dense|matrix|mix(er|ing)?")
# and of those that multiply.
WEIGHT = re.compile(
    f"{PRODUCT.pattern}|w[iokqvud]*|weights?|kernels?|query|key|value|out|[qkv]{{2,3}}"
    "|up|down|gate|experts?|router|fc|ff|ffn|mlp|conv|heads?|lora"
)


def is_added(name: str) -> bool:
    """Returns True if a parameter of this name is added, looked up or a scale.

    >>> is_added("pos_embedding"), is_added("layer_scale1"), is_added("pos_proj")
    (True, True, False)
    """
    *_, last = words = ["", *_words(name)]
    return any(map(ADDED.fullmatch, words)) and not PRODUCT.fullmatch(last)


def is_multiplied(name: str) -> bool:
    """Returns True if a word of the name says that the parameter multiplies its input.

    >>> is_multiplied("in_proj"), is_multiplied("w_q"), is_multiplied("latent")
    (True, True, False)
    """
    return any(map(WEIGHT.fullmatch, _words(name)))


def _words(name: str) -> list[str]:
    return re.findall("[a-z]+", name.lower())
