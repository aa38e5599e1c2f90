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
# # Quickstart: adapt a model of your own
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/snella_jax/blob/main/colabs/quickstart.ipynb)
#
# A small MLP-Mixer, written in this notebook, has learnt to read the digits 0 to 4. SNELLA
# adapts it to 5 to 9: you watch the weight matrices compete for the weights that may move,
# merge the result into a plain Flax model, and save an adapter.
#
# It needs no downloads (the digits come with scikit-learn) and less than 1 GB of memory.
# On two busy CPU cores it took three minutes, most of them to compile; there the adapted
# model read 97.3% of the digits 5 to 9. **It was not run on a TPU or a GPU.**

# %% [markdown]
# ## Install
#
# On Colab the next cell installs the library (a minute or two; pip may complain about
# other packages, which does not matter here). Anywhere else it installs nothing: open
# the notebook in a clone in which `pip install -e ".[experiments]" jupyterlab` was run.

# %% extras=""
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
    extras = ",".join(filter(None, ["", chip]))
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
# ## A model of your own
#
# Any `flax.nnx` model will do. This one cuts an image of 8 x 8 pixels into 16 patches, and
# mixes tokens and channels in turn.

# %%
import os
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import snella_jax as snella

SMALL = os.environ.get("SNELLA_COLAB") == "small"
WIDTH, DEPTH, EPOCHS = (32, 2, 6) if SMALL else (64, 4, 24)
BATCH = 32


class Mlp(nnx.Module):
    def __init__(self, size, hidden, rngs):
        self.up = nnx.Linear(size, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, size, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


class Block(nnx.Module):
    def __init__(self, tokens, width, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.tokens = Mlp(tokens, 2 * width, rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.channels = Mlp(width, 2 * width, rngs)

    def __call__(self, x):  # [batch, tokens, width]
        x = x + self.tokens(self.norm1(x).swapaxes(1, 2)).swapaxes(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nnx.Module):
    def __init__(self, width, depth, classes, rngs):
        self.embed = nnx.Conv(1, width, (2, 2), strides=2, rngs=rngs)
        self.blocks = nnx.List([Block(16, width, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images):  # [batch, 8, 8, 1]
        x = self.embed(images).reshape(len(images), 16, -1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


# %% [markdown]
# ## The base: a reader of 0 to 4
#
# This is ordinary training with Flax and optax. With a pre-trained model you would load
# its weights here instead.

# %%
images, labels = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
order = np.random.default_rng(0).permutation(len(images))
images, labels = images[order], labels[order]


def split(wanted):
    """Returns training and test images of some digits, with their classes 0, 1, ..."""
    chosen = np.isin(labels, wanted)
    x, y = images[chosen], labels[chosen] - wanted[0]
    cut = len(x) * 3 // 4
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


def batches(data, seed):
    x, y = data
    order = np.random.default_rng(seed).permutation(len(x))
    for i in range(0, len(x) - BATCH + 1, BATCH):
        chosen = order[i : i + BATCH]
        yield x[chosen], y[chosen]


def loss_fn(model, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def predict(model, x):
    return model(x).argmax(-1)


def accuracy(model, data):
    x, y = data
    return float((predict(model, x) == y).mean())


@nnx.jit
def pretrain_step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)
    return loss


low, low_test = split(range(5))
base = Mixer(WIDTH, DEPTH, classes=5, rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(base, optax.adamw(2e-3), wrt=nnx.Param)
for epoch in range(EPOCHS // 2):
    for batch in batches(low, epoch):
        loss = pretrain_step(base, optimizer, batch)
print(f"the base reads {accuracy(base, low_test):.1%} of the digits 0 to 4")

# %% [markdown]
# ## Adapt it
#
# `targets` is a regular expression over the paths of layers, `trainable` one over what
# trains as a whole: here the head, which is new. All other weights stay as they are, and
# get an update `delta(a, b)` from two thin factors. At the end of training
# `target_density` of them may have moved.

# %%
high, high_test = split(range(5, 10))
base.head = nnx.Linear(WIDTH, 5, rngs=nnx.Rngs(1))
config = snella.SnellaConfig(
    rank=8,
    target_density=0.2,
    targets=r"blocks/.*/(up|down)",
    trainable="head",
)
steps_per_epoch = len(high[0]) // BATCH
rate = optax.cosine_decay_schedule(1e-2, EPOCHS * steps_per_epoch)
state = snella.Tuning.create(
    base,
    config,
    optax.adamw(rate, mask=snella.decay_mask),
    epochs=EPOCHS,
    steps_per_epoch=steps_per_epoch,
    rngs=nnx.Rngs(2),
)
snella.describe(state.model)

# %% [markdown]
# ## Train it
#
# `step` is compiled once. `end_of_epoch` compares how important each matrix was for the
# loss, and divides a budget that shrinks from epoch to epoch among them.

# %%
history = []
for epoch in range(EPOCHS):
    for batch in batches(high, 100 + epoch):
        state, loss = state.step(loss_fn, batch)
    state = state.end_of_epoch()
    history.append(state.metrics())
    if epoch % (EPOCHS // 6) == 0 or epoch == EPOCHS - 1:
        score = accuracy(state.model, high_test)
        print(
            f"epoch {epoch:2}  loss {loss:.3f}  test accuracy {score:.1%}  "
            f"{state.density:.0%} of the weights may move"
        )

# %% [markdown]
# ## Watch the budgets move

# %% alt="the share of each matrix's weights that may move, over the epochs"
names = [name for name in history[0] if name.startswith("density/")]
shares = np.array([[row[name] for name in names] for row in history])
figure, (total, heat) = plt.subplots(
    2, 1, figsize=(8, 6), height_ratios=(1, 3), layout="constrained", sharex=True
)
total.plot([row["density"] for row in history], ".-")
total.set(ylabel="of all weights", ylim=(0, 1))
mesh = heat.imshow(shares.T, aspect="auto", vmin=0, vmax=1, cmap="magma")
ticks = [name.removeprefix("density/blocks/") for name in names]
heat.set(xlabel="epoch", yticks=range(len(names)), yticklabels=ticks)
figure.colorbar(mesh, ax=heat, label="share that may move")
plt.show()

# %% [markdown]
# Each row is a weight matrix, from the first block to the last; bright means that all its
# weights may move. At first all do. Then matrices that matter for the new digits keep their
# weights, and others lose nearly all; one that lost all of them gets no gradient, and the
# log names it.

# %% [markdown]
# ## Merge and save
#
# `merge` adds the update to the weights: a plain `Mixer`, as fast as the base. The adapter
# is a folder with the factors and the head, which `snella.load` puts on the base again.

# %%
plain = state.merge()
state.save("digits_adapter", base="the Mixer of this notebook")
loaded = snella.load(base, "digits_adapter")
assert accuracy(loaded, high_test) == accuracy(state.model, high_test)
size = sum(file.stat().st_size for file in Path("digits_adapter").iterdir())
print(f"{type(plain).__name__}: {accuracy(plain, high_test):.1%} of the digits 5 to 9")
print(f"digits_adapter: {size / 1024:.0f} KiB")

archive = shutil.make_archive("digits_adapter", "zip", "digits_adapter")
if "google.colab" in sys.modules:
    from google.colab import files

    files.download(archive)

# %% [markdown]
# ## What changed

# %% alt="the weights of one matrix before, what was added to them, and after"
matrices = snella.sparsity(state.model)
most = max(matrices, key=lambda matrix: matrix.change)
index, *inside = most.name.removeprefix("blocks/").split("/")


def weights(model):
    layer = model.blocks[int(index)]
    for name in inside:
        layer = getattr(layer, name)
    return np.asarray(layer.kernel)


before, after = weights(base), weights(plain)
limit = np.abs(before).max()
figure, panels = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
panels[0].imshow(before, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
panels[1].imshow(after - before, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
panels[2].imshow(after, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
titles = f"{most.name} of the base", f"update: {most.density:.0%} of it", "merged"
for axes, title in zip(panels, titles):
    axes.set(title=title, xlabel="outputs", ylabel="inputs")
plt.show()

# %% alt="test digits 5 to 9 with what the merged model reads, mistakes in red"
x, y = high_test
read = np.asarray(predict(plain, x))
first = np.argsort(read == y, kind="stable")[:24]  # mistakes first
figure, panels = plt.subplots(3, 8, figsize=(9, 4), layout="constrained")
for axes, i in zip(panels.flat, first):
    axes.imshow(x[i, ..., 0], cmap="gray_r")
    if read[i] == y[i]:
        axes.set_title(f"{read[i] + 5}")
    else:
        axes.set_title(f"{read[i] + 5}, is {y[i] + 5}", color="red")
    axes.axis("off")
plt.show()

# %% [markdown]
# Above, the matrix whose update is largest: most of its entries are exactly those of the
# base (white in the middle), the rest moved. Below, test digits and what the merged model
# reads, its mistakes first and in red.
#
# **Next**: [what happens inside](https://github.com/OWNER/snella_jax/blob/main/colabs/inside_snella.ipynb), [custom layers and scans](https://github.com/OWNER/snella_jax/blob/main/docs/own_models.md),
# [what to start with](https://github.com/OWNER/snella_jax/blob/main/docs/choosing.md).
