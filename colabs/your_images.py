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
# # Your own images: from a folder to an adapter
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/snella_jax/blob/main/colabs/your_images.ipynb)
#
# Put images into a folder for each class, or list them in a CSV file, and run all cells:
# the images are checked, a pre-trained ViT is fine-tuned on them with SNELLA beside a
# linear probe, and you download an adapter of a few MB. Until you name images of your own,
# the notebook draws some.
#
# As it stands it needs no downloads and 1 GB of memory; on two busy CPU cores it took four
# minutes, and 92% of the drawn test images were right (the linear probe: 68%). **It was not
# run on a TPU or a GPU.** With the weights of a ViT-B/16 (410 MB) a step on 32 images needs
# [3.4 GiB of a v5e's 16](https://github.com/OWNER/snella_jax/blob/main/experiments/results/memory/v5e_vit_b16_batch32/memory.json),
# for which it was only compiled. An epoch takes a step for every 32 images: with
# 10,000 of them and a second for a step, a session of 90 minutes allows 15 `EPOCHS`.

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
# ## Your images, your weights
#
# `IMAGES` is a folder or a CSV file:
#
# | layout | |
# |---|---|
# | `train/CLASS/*.jpg`, `test/CLASS/*.jpg`, perhaps `val/CLASS/*.jpg` | a folder for each class |
# | columns `path`, `label`, `split` (train, val, test) | a CSV file; paths relative to it |
#
# On Colab, drag a zip file into the files panel and unpack it by `!unzip -q my_images.zip`,
# or mount your Drive in that panel and give the path there. All usual formats will do, in
# any sizes ([more on data](https://github.com/OWNER/snella_jax/blob/main/docs/data.md)).
#
# `WEIGHTS` is a file or folder of published weights, such as
# [ViT-B_16.npz](https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz), which
# photographs need. Without it a tiny grey ViT that comes with the library is taken, which
# has seen only 28 x 28 pixels of clothes.

# %%
IMAGES = ""  # @param {type: "string"}
WEIGHTS = ""  # @param {type: "string"}
EPOCHS = 15  # @param {type: "slider", min: 3, max: 100, step: 1}

# %%
import dataclasses
import math
import random
import time
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from IPython.display import Image as Picture
from PIL import Image, ImageDraw

import snella_jax as snella
from experiments import vtab
from experiments.config import presets
from experiments.pretrained import base_models
from experiments.tasks import catalogue

SMALL = os.environ.get("SNELLA_COLAB") == "small"
if SMALL:
    EPOCHS = 3

CORNERS = {"triangle": 3, "square": 4, "hexagon": 6, "star": 10}


def drawn(corners, rng):
    """Returns a grey picture of a polygon, or of a star, somewhere on a background."""
    picture = Image.new("L", (96, 96), rng.randrange(140, 256))
    x, y, turn = rng.uniform(40, 56), rng.uniform(40, 56), rng.uniform(0, 2 * math.pi)
    size = rng.uniform(25, 38)
    points = []
    for i in range(corners):
        radius = size * (0.45 if corners == 10 and i % 2 else 1)
        angle = turn + 2 * math.pi * i / corners
        points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
    ImageDraw.Draw(picture).polygon(points, fill=rng.randrange(0, 110))
    return picture


def draw_folder(folder, train, test):
    """Writes pictures as a user's folder has them: split, class, file."""
    rng = random.Random(0)
    for split, count in (("train", train), ("test", test)):
        for name, corners in CORNERS.items():
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                drawn(corners, rng).save(folder / split / name / f"{i}.png")


if not IMAGES:
    IMAGES = "drawn_images"
    draw_folder(Path(IMAGES), *((24, 6) if SMALL else (200, 100)))

# %% [markdown]
# ## Look at them
#
# Labels that are wrong are seen at a glance here, and cost a training later.

# %% alt="some of the training images with their classes"
task = catalogue.load(IMAGES)
print(
    f"{len(task.train)} images to train on, {len(task.validation)} to validate,",
    end=" ",
)
print(f"{len(task.test)} to test; classes: {', '.join(task.names)}")


def show_images(source, indices, titles):
    """Draws images of a split in a grid; mistakes have red titles."""
    panels = plt.subplots(2, 6, figsize=(10, 3.8), layout="constrained")[1]
    for axes in panels.flat:
        axes.axis("off")
    for axes, index, title in zip(panels.flat, indices, titles):
        axes.imshow(np.squeeze(source[index]["image"]), cmap="gray", vmin=0, vmax=255)
        color = "red" if ",\nis " in title else "black"
        axes.set_title(title, color=color, fontsize=9)
    plt.show()


some = random.Random(1).sample(range(len(task.train)), min(12, len(task.train)))
show_images(task.train, some, [task.names[task.train[i]["label"]] for i in some])

# %% [markdown]
# ## Fine-tune
#
# This is the command `python -m experiments.vtab`, called from here. It checks every
# image first. [Its options](https://github.com/OWNER/snella_jax/blob/main/docs/training.md)
# can be added as more words; `--search` finds the learning rate by itself.

# %%
run = Path("runs") / time.strftime("images-%H%M%S")
words = ["--config", "quickstart", "--task", IMAGES, "--methods", "linear", "snella"]
words += ["--epochs", f"{EPOCHS}", "--out", f"{run}"]
if WEIGHTS:  # a large model takes smaller steps
    words += ["--model", WEIGHTS, "--image_size", "224", "--snella.lr", "3e-3"]
    words += ["--dtype", "float32" if jax.default_backend() == "cpu" else "bfloat16"]
summary = vtab.main(words)

# %% alt="loss and accuracy over the epochs"
Picture(run / "figures/curves.png")

# %% alt="importance and budget of every matrix over the epochs"
Picture(run / "figures/allocation.png")

# %% [markdown]
# ## The adapter
#
# The base and the adapter give the tuned model, here or anywhere else. This is how a
# program of yours would load them.

# %%
config = dataclasses.replace(
    presets.VTAB["quickstart"].config,
    model=WEIGHTS or "vit_fashion_mnist",
    image_size=224 if WEIGHTS else None,
)
base = base_models.load(config, task.classes)
_, transform = base_models.transforms(config, base)
model = snella.merge(snella.load(base, run / "adapters/snella"))


@nnx.jit
def probabilities(model, images):
    return nnx.softmax(model(images))


def classify(images):
    """Returns the classes of images of any size, and how sure the model is."""
    ready = [transform(image, np.random.default_rng(0)) for image in images]
    parts = np.array_split(np.stack(ready), math.ceil(len(ready) / 32))
    found = np.concatenate([probabilities(model, jnp.asarray(part)) for part in parts])
    return found.argmax(-1), found.max(-1)


shown = random.Random(2).sample(range(len(task.test)), min(200, len(task.test)))
classes, sure = classify([task.test[i]["image"] for i in shown])
labels = np.array([task.test[i]["label"] for i in shown])
print(f"{(classes == labels).mean():.1%} of {len(shown)} test images are right")

folder = run / "adapters/snella"
archive = shutil.make_archive("my_adapter", "zip", folder)
print(f"my_adapter.zip: {os.path.getsize(archive) / 2**20:.1f} MiB")
if "google.colab" in sys.modules:
    from google.colab import files

    files.download(archive)

# %% alt="test images with the classes that the model finds, mistakes first and in red"
wrong, right = np.flatnonzero(classes != labels), np.flatnonzero(classes == labels)
order = [*wrong[:6], *right][:12]
titles = []
for i in order:
    title = f"{task.names[classes[i]]} ({sure[i]:.0%})"
    if classes[i] != labels[i]:
        title += f",\nis {task.names[labels[i]]}"
    titles.append(title)
show_images(task.test, [shown[i] for i in order], titles)

# %% [markdown]
# Test images, mistakes first: what the model says and how sure it is, and in red what is
# true. Above, the linear probe shows what the pre-trained features alone are worth; the
# lower curves and the map of budgets, which matrices SNELLA changed to do better. For a
# picture of yours (`from PIL import ImageOps`):
# `classify([np.asarray(ImageOps.exif_transpose(Image.open("picture.jpg")).convert("RGB"))])`.
#
# **Next**: [every method on your images](https://github.com/OWNER/snella_jax/blob/main/docs/training.md#methods),
# [what to do with an adapter](https://github.com/OWNER/snella_jax/blob/main/docs/adapters.md),
# [published weights](https://github.com/OWNER/snella_jax/blob/main/docs/models.md).
