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
# # Inside SNELLA: kernels, thresholds, allocation
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/snella_jax/blob/main/colabs/inside_snella.ipynb)
#
# How two thin factors become a sparse update, in pictures that you can change: on Colab
# the settings above a picture are a form; change one and run its cell again. The
# equations are in [how SNELLA works](https://github.com/OWNER/snella_jax/blob/main/docs/how_it_works.md).
#
# It needs no data, no weights and less than 1 GB of memory, and takes half a minute on two
# CPU cores. **It was not run on a TPU or a GPU**, and its matrices are too small to need one.

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
# ## Kernels: from two factors to a matrix
#
# Each weight matrix of `n` inputs and `m` outputs has factors `a` and `b` with a few
# columns. LoRA multiplies them (`linear`), and the product's rank is at most their number
# of columns. The other kernels look at distances between rows instead.

# %% alt="updates of six kernels as pictures, and their singular values"
import os

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import snella_jax as snella

SMALL = os.environ.get("SNELLA_COLAB") == "small"

RANK = 8  # @param {type: "slider", min: 2, max: 32, step: 2}
SPREAD = 1.0  # @param {type: "slider", min: 0.1, max: 3, step: 0.1}
SHAPE = 64, 96


def factors_of(kernel, shape=SHAPE, seed=0):
    """Returns factors with normally distributed entries: what training may end with."""
    a, b = jax.random.split(jax.random.key(seed))
    factors = kernel.init(a, shape, RANK)
    for name, key in ("a", a), ("b", b):
        factors[name] = SPREAD * jax.random.normal(key, factors[name].shape)
    return factors


def show(axes, matrix, title):
    """Draws a matrix: 0 is white, negative red, positive blue."""
    limit = float(jnp.abs(matrix).max())
    axes.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit)
    axes.set(title=title, xticks=[], yticks=[])


figure, panels = plt.subplot_mosaic(
    [
        ["linear", "piecewise_linear", "rbf", "spectra"],
        ["sigmoid", "normalized_rbf", "mix_k", "spectra"],
    ],
    figsize=(12, 4.2),
    layout="constrained",
)
for name, kind in snella.kernels.KERNELS.items():
    kernel = kind()
    delta = kernel.apply(factors_of(kernel))
    show(panels[name], delta, name)
    values = np.linalg.svd(delta, compute_uv=False)
    panels["spectra"].semilogy(
        range(1, len(values) + 1), values / values[0], label=name
    )
panels["spectra"].axvline(RANK, color="black", linewidth=0.5)
panels["spectra"].set(title="singular values", ylim=(1e-4, 1.5))
panels["spectra"].legend(fontsize="x-small", loc="upper right")
plt.show()

# %% [markdown]
# Blue is positive, red negative. The singular values of `linear` end at the number of
# columns (the black line); those of the others go on, so the same few parameters reach
# matrices of a higher rank. `rbf` and `sigmoid` saturate: raise `SPREAD`, and the rows
# are so far apart that nearly all entries are equal.

# %% [markdown]
# ## The threshold: competition inside a matrix
#
# A matrix has a budget. `threshold` finds the number `tau` that exactly so many entries
# exceed in magnitude, and a gate says what becomes of the survivors.

# %% alt="an update, a histogram of its magnitudes with the threshold, and what survives"
DENSITY = 0.1  # @param {type: "slider", min: 0.01, max: 1, step: 0.01}
GATE = "product"  # @param ["product", "released", "soft", "hard", "none"]

kernel = snella.kernels.mix_k()
delta = kernel.apply(factors_of(kernel))
delta = delta - delta.mean()  # both signs
budget = round(DENSITY * delta.size)
tau = snella.threshold(delta, budget)
sparse = snella.sparsify(delta, budget, gate=GATE)
print(f"budget {budget}: {int((jnp.abs(delta) > tau).sum())} entries exceed {tau:.4f}")

figure, panels = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
show(panels[0], delta, "delta(a, b)")
show(panels[2], sparse, f"gate {GATE}, density {DENSITY:.0%}")
size = np.abs(delta).ravel()
bins = np.linspace(0, size.max(), 60)
panels[1].hist([size[size <= tau], size[size > tau]], bins, stacked=True)
panels[1].axvline(float(tau), color="black", linewidth=1)
panels[1].set(title="magnitudes: dropped, kept", yticks=[])
plt.show()

# %% [markdown]
# Nothing is sorted for this. The bits of a positive float, read as an integer, are in the
# order of the floats, so a search from the highest bit to the lowest needs one count over
# the matrix for each bit (on accelerators the library finds four bits with each pass).
# Here it is in NumPy, with what it knows after each count:

# %% alt="the search for the threshold closes in on it, a bit at a time"
bits = np.abs(np.asarray(delta)).view(np.uint32)
found, course = np.uint32(0), []
for bit in reversed(range(31)):
    tried = found | np.uint32(1 << bit)
    if (bits >= tried).sum() > budget:  # the (budget + 1)-th largest is at least this
        found = tried
    course.append(found.view(np.float32))
assert found.view(np.float32) == tau  # to the last bit

figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
axes.step(range(1, 32), course, where="mid")
axes.axhline(float(tau), color="black", linewidth=0.5)
axes.set(xlabel="counts over the matrix", ylabel="known part of tau")
plt.show()

# %% alt="what each gate makes of an entry, over the entry's value"
line = jnp.linspace(-1, 1, 401)
budget_of_line = round(0.4 * line.size)
figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
for gate in ("none", "hard", "soft", "released", "product"):
    axes.plot(line, snella.sparsify(line, budget_of_line, gate=gate), label=gate)
axes.set(xlabel="delta", ylabel="what is added to the weight")
axes.legend()
plt.show()

# %% [markdown]
# Above, the search: the first counts find the exponent, the others the digits. Below, the
# gates, with a budget of two fifths: around 0 all but `none` give 0. `hard` and `released`
# jump at the threshold; `soft` and the paper's `product` begin at 0, so an entry that comes
# or goes does so without a jump. `product` makes small updates smaller still, which is why
# SNELLA needs a higher learning rate than LoRA.

# %% [markdown]
# ## Allocation: competition between matrices
#
# At the end of each epoch a total budget is divided by importance. No matrix gets more
# than it has weights; what it cannot take goes to the others. The total falls along a
# cubic curve.

# %% alt="budgets of five matrices for given scores, and the total budget over the epochs"
SCORES = [8.0, 3.0, 2.0, 1.0, 0.0]  # @param {type: "raw"}
TOTAL = 2000  # @param {type: "slider", min: 0, max: 5000, step: 100}
FLOOR = 0.0  # @param {type: "slider", min: 0, max: 1, step: 0.05}
WARMUP = 0  # @param {type: "slider", min: 0, max: 10, step: 1}

capacities = [1000] * len(SCORES)
budgets = snella.allocate(SCORES, TOTAL, capacities, floor=FLOOR)
figure, (bars, curve) = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
names = [f"score {score:g}" for score in SCORES]
bars.bar(names, capacities, color="lightgrey", label="weights")
bars.bar(names, budgets, label="budget")
bars.set(ylim=(0, 1300))
bars.legend(ncols=2, loc="upper center")
for power in (1, 2, 3):
    schedule = snella.budget_schedule(5000, 1000, steps=20, power=power, warmup=WARMUP)
    curve.plot([schedule(t) for t in range(20)], ".-", label=f"power {power}")
curve.set(xlabel="epoch", ylabel="total budget", ylim=(0, 5200), xticks=range(0, 20, 5))
curve.legend()
plt.show()

# %% [markdown]
# ## Does the competition find what has to change?
#
# A network of six layers has to imitate another, which is equal but for one layer: there a
# twentieth of the weights differ. Nothing tells SNELLA which. Inputs are random numbers,
# and at last a fiftieth of all weights may move.

# %%
CHANGED = 2  # @param {type: "slider", min: 0, max: 5, step: 1}
LAYERS, WIDTH = 6, 32
EPOCHS, STEPS = (12, 20) if SMALL else (30, 40)


def forward(params, x):
    for i in range(LAYERS):
        x = x + jnp.tanh(x @ params[f"layer{i}"])
    return x


keys = jax.random.split(jax.random.key(0), LAYERS + 2)
student = {
    f"layer{i}": jax.random.normal(keys[i], (WIDTH, WIDTH)) / WIDTH**0.5
    for i in range(LAYERS)
}
change = jax.random.normal(keys[-1], (WIDTH, WIDTH))
change = snella.sparsify(change, WIDTH**2 // 20, gate="hard") / 4
teacher = student | {f"layer{CHANGED}": student[f"layer{CHANGED}"] + change}


def loss_fn(params, x):
    return jnp.square(forward(params, x) - forward(teacher, x)).mean()


config = snella.SnellaConfig(
    rank=8, target_density=0.02, targets=r"layer\d", trainable=""
)
state = snella.Tuning.create_tree(
    student,
    config,
    optax.adam(1e-2),
    epochs=EPOCHS,
    steps_per_epoch=STEPS,
    key=keys[-2],
)
shares, losses = [], []
for epoch in range(EPOCHS):
    for step in range(STEPS):
        x = jax.random.normal(jax.random.key(epoch * STEPS + step), (256, WIDTH))
        state, loss = state.step(loss_fn, x)
    state = state.end_of_epoch()
    losses.append(float(loss))
    shares.append([state.metrics()[f"density/layer{i}"] for i in range(LAYERS)])
print(f"loss {losses[0]:.4f} after the first epoch, {losses[-1]:.6f} after the last")

# %% alt="the share of each layer's weights that may move, epoch by epoch, and the loss"
figure, (heat, curve) = plt.subplots(
    2, 1, figsize=(9, 5), height_ratios=(2, 1), layout="constrained", sharex=True
)
mesh = heat.imshow(np.transpose(shares), aspect="auto", vmin=0, vmax=1, cmap="magma")
heat.set(yticks=range(LAYERS), ylabel="layer", title=f"layer {CHANGED} was changed")
figure.colorbar(mesh, ax=heat, label="may move")
curve.semilogy(losses)
curve.set(xlabel="epoch", ylabel="loss")
plt.show()

# %% alt="the change of the teacher beside the update that was learnt"
learnt = state.merge()[f"layer{CHANGED}"] - student[f"layer{CHANGED}"]
figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
show(panels[0], change, f"layer {CHANGED}: what was changed")
show(panels[1], learnt, f"layer {CHANGED}: what was learnt")
plt.show()
same = int(((change != 0) & (learnt != 0)).sum())
print(f"{same} of the {int((change != 0).sum())} changed weights were found")

# %% [markdown]
# Each row is a layer, each column an epoch; bright means that nearly all its weights may
# move. At first all do. As the total falls, the budget goes to the layer that was changed,
# and the threshold inside it to the weights that differ; the log names layers that have
# none left. Where the two pictures of the last cell agree, SNELLA found what to change. Try
# another `CHANGED`: on a CPU, 43 to 51 of the 51 weights were found, whichever of the six
# layers it was.
#
# **Next**: [a model of your own](https://github.com/OWNER/snella_jax/blob/main/colabs/quickstart.ipynb),
# [what the kernels can fit](https://github.com/OWNER/snella_jax/blob/main/docs/kernels.md),
# [what every setting does in training](https://github.com/OWNER/snella_jax/blob/main/docs/ablations.md).
