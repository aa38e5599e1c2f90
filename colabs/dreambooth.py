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
# # Teach Stable Diffusion 3 a thing of yours
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/snella_jax/blob/main/colabs/dreambooth.ipynb)
#
# A few pictures of one thing teach a diffusion model what "sks vase" looks like
# (DreamBooth). Then it draws that vase on a beach, in the desert, or in other colours.
# SNELLA trains the projections of attention; what it learnt is one small file.
#
# As it stands, the notebook needs no downloads but one small package: the model is a toy
# with Stable Diffusion 3's architecture, 5 million weights and pictures of 32 x 32 pixels,
# that was trained on emoji and lies in the repository. The vase is drawn here. With
# the weights of Stable Diffusion 3 medium and photographs of your own, the same cells
# train that.
#
# With the toy it took five minutes on two busy CPU cores, in 1.1 GB of memory. **It was not run on
# a TPU or a GPU, nor with the weights of Stable Diffusion 3**: a step of those was only
# [compiled for a v5e](https://github.com/OWNER/snella_jax/blob/main/experiments/results/memory/v5e_sd3_medium_batch1/memory.json).
# There the training is 500 updates of four pictures, one after the other: where a picture
# takes more than two seconds, a session of 90 minutes needs a lower `UPDATES`, a multiple
# of 20.

# %% [markdown]
# ## Install
#
# On Colab the next cell installs the library (a minute or two; pip may complain about
# other packages, which does not matter here). Anywhere else it installs nothing: open
# the notebook in a clone in which `pip install -e ".[experiments,generation]" jupyterlab` was run.

# %% extras="experiments,generation"
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
    extras = ",".join(filter(None, ["experiments,generation", chip]))
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

# %%
import importlib.util
import sys

if "google.colab" in sys.modules and not importlib.util.find_spec("open_clip"):
    print("Installing open-clip-torch, for the merges of CLIP's tokenizer alone")
    # %pip install -q --no-deps open-clip-torch==3.3.0

# %% [markdown]
# ## The model
#
# The weights of Stable Diffusion 3 medium are gated: accept their licence at Hugging Face,
# log in by `!hf auth login`, then
# `!hf download stabilityai/stable-diffusion-3-medium-diffusers --local-dir sd3`, and give
# `sd3`. In bfloat16 the transformer takes 4.1 GB; the text encoders (11 GB) stay in the
# memory of the CPU, and are dropped once the prompts are encoded.

# %%
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from PIL import Image, ImageDraw

import snella_jax as snella
from experiments.data import photographs
from experiments.pretrained import toy_sd3
from experiments.training import latents
from experiments.training.flow_matching import FlowMatching
from snella_jax.models import sd3

SMALL = os.environ.get("SNELLA_COLAB") == "small"
MODEL = ""  # such as sd3; empty for the toy
TOKEN, CLASS = "sks", "vase"  # "sks vase" is the name of the thing

if MODEL:
    SIZE, GUIDANCE, RATE, UPDATES = 512, 7.0, 1e-4, 500
    PARTS, AT_ONCE = 4, 2  # of a step's four pictures; pictures drawn at once
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    pipeline = sd3.load(MODEL, t5_length=77, text_on="host", remat="blocks", **types)
    codec = {"scale": pipeline.vae.scale, "shift": pipeline.vae.shift}
else:
    SIZE, GUIDANCE, RATE, UPDATES = toy_sd3.SIZE, toy_sd3.GUIDANCE, 3e-3, 200
    PARTS, AT_ONCE = 1, 6
    pipeline, codec = toy_sd3.load(TOKEN), {}
STEPS = 28  # of the sampler
if SMALL:
    UPDATES, STEPS = 40, 14

# %% [markdown]
# ## Pictures of one thing
#
# `PHOTOGRAPHS` is a folder with some photographs of yours, which become squares (on your
# Drive after `from google.colab import drive; drive.mount("/content/drive")`); say what
# they show in `CLASS` above. The toy knows the nouns of emoji.

# %% alt="five pictures of a teal vase with a yellow zigzag"
PHOTOGRAPHS = ""  # such as /content/drive/MyDrive/mug; empty for a drawn vase


def drawn(rng, side=256):
    """Draws a teal vase with a yellow zigzag, of some size at some place."""
    grey = int(rng.integers(215, 256))
    picture = Image.new("RGB", (side, side), (grey, grey, grey))
    pen = ImageDraw.Draw(picture)
    unit, teal = int(rng.integers(19, 24)), (0, 140, 140)
    x, y = (side // 2 + int(v) for v in rng.integers(-20, 21, 2))

    def place(*points):
        return [(x + int(a * unit), y + int(b * unit)) for a, b in points]

    pen.polygon(place((-1.6, -5), (1.6, -5), (0.9, -2.5), (-0.9, -2.5)), teal)
    pen.ellipse(place((-3.4, -3.2), (3.4, 3.6)), teal)
    pen.rectangle(place((-1.7, 3), (1.7, 4.4)), (0, 100, 100))
    zigzag = place(
        *[(a, 1.1 * (-1) ** n) for n, a in enumerate(np.arange(-3, 3.1, 1.5))]
    )
    pen.line(zigzag, (255, 205, 40), width=unit, joint="curve")
    return picture


folder = Path(PHOTOGRAPHS or "drawn_vase")
if not PHOTOGRAPHS:
    folder.mkdir(exist_ok=True)
    for number in range(5):
        drawn(np.random.default_rng(number)).save(folder / f"{number}.png")
squares = photographs.read(folder, SIZE).images


def row(panels, pictures):
    for axes, picture in zip(panels, pictures, strict=False):
        axes.imshow(picture)
        axes.axis("off")


_, panels = plt.subplots(1, len(squares), figsize=(9, 2), squeeze=False)
row(panels[0], squares)
plt.show()

# %% [markdown]
# ## Before
#
# "sks" means nothing to the model: it draws any vase. All prompts are encoded now, once;
# for other prompts run the cell that loads the model again.
# The same keys give the same noise to begin with, so that pictures can be compared.

# %%
NAME = f"{TOKEN} {CLASS}"
PROMPTS = (
    f"a photo of {NAME}",
    f"a {NAME} on the beach",
    f"a {NAME} on a red background",
    f"a {NAME} in the desert",
    f"a {NAME} with a city in the background",
    f"a purple {NAME}",
)
if pipeline.encoders is not None:
    text, empty = pipeline.encode(PROMPTS), pipeline.encode("")
    pipeline = pipeline.without_encoders()


def pictures(transformer):
    """Returns a picture of each prompt."""
    drawing = pipeline.with_transformer(transformer)
    keys, drawn = jax.random.split(jax.random.key(1), len(PROMPTS)), []
    for i in range(0, len(PROMPTS), AT_ONCE):
        now = slice(i, i + AT_ONCE)
        own = text[0][now], text[1][now]
        options = {"size": SIZE, "guidance": GUIDANCE, "steps": STEPS, "key": keys[now]}
        drawn.append(np.asarray(drawing(own, empty, **options)))
    return np.concatenate(drawn)


before = pictures(pipeline.transformer)

# %% [markdown]
# ## Tune
#
# A step draws noise levels and noise for four pictures; the model learns the way from noise
# to them. Budgets move between rounds of a twentieth of the training.

# %%
ROUNDS, BATCH = 20, 4
context, pooled = (np.repeat(x[:1], BATCH, axis=0) for x in text)
moments = latents.moments(pipeline.vae, squares)
objective = FlowMatching(**codec, noise_shift=pipeline.shift)


def loss_fn(transformer, batch):
    return objective.loss(transformer, batch, batch["key"][0])


state = snella.Tuning.create(
    pipeline.transformer,
    snella.SnellaConfig(rank=4, target_density=0.3),
    optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE)),
    epochs=ROUNDS,
    steps_per_epoch=UPDATES // ROUNDS,
    rngs=nnx.Rngs(0),
)
rng, losses = np.random.default_rng(0), []
for update in range(UPDATES):
    chosen = rng.permutation(np.resize(np.arange(len(squares)), BATCH + update))[:BATCH]
    batch = {name: values[chosen] for name, values in moments.items()}
    keys = jax.random.split(jax.random.key(update), BATCH)
    batch |= {"context": context, "pooled": pooled, "key": keys}
    state, loss = state.step(loss_fn, batch, accumulate=PARTS)
    losses.append(float(loss))
    if (update + 1) % (UPDATES // ROUNDS) == 0:
        state = state.end_of_epoch()
print(f"loss {np.mean(losses[:20]):.4f} at first, {np.mean(losses[-20:]):.4f} at last")

tuned = state.merge()
delta = "vase_delta.safetensors"
snella.save_delta(delta, pipeline.transformer, tuned)
print(f"{delta}: {Path(delta).stat().st_size / 2**20:.1f} MiB")

# %% [markdown]
# ## After

# %% alt="pictures of each prompt, drawn before and after the training"
after = pictures(tuned)
figure, panels = plt.subplots(
    2, len(PROMPTS), figsize=(2 * len(PROMPTS), 4.8), layout="constrained"
)
row(panels[0], before)
row(panels[1], after)
for axes, prompt in zip(panels[0], PROMPTS, strict=True):
    axes.set_title(prompt.replace(NAME, f"{NAME}\n"), fontsize=8)
for axes, name in zip(panels[:, 0], ("before", "after"), strict=True):
    axes.axis("on")
    axes.set(xticks=[], yticks=[], ylabel=name, frame_on=False)
plt.show()

# %% [markdown]
# The upper row is what the model made of the words before, the lower row what it draws now,
# from the same noise. In the first column stands the prompt that was trained. In the others
# the vase should keep its teal and its zigzag, and stand where the prompt says; a toy of 32
# pixels does one or the other better. Where all pictures look like those it was
# trained on, fewer updates or a lower rate help.
#
# **Next**: [all methods and measures by one
# command](https://github.com/OWNER/snella_jax/blob/main/docs/generation.md),
# [the file of differences](https://github.com/OWNER/snella_jax/blob/main/docs/adapters.md)
# and `snella.apply_delta`.
