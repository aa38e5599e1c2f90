"""Configs by name: the quickstart, sets that need no network, VTAB-1k and FGVC.

The settings of VTAB-1k and FGVC are those of the authors' released code, a row for each
task. It counts sparsity, `1 - density`. Where it publishes none for SNELLA, the row is
that of SNELL, its predecessor, at the same rank, and its config's `source` says so.
"""

import dataclasses
from typing import Any, Generic, TypeVar

from experiments.config.images import ImageConfig
from experiments.config.run_config import RunConfig
from experiments.methods.lora import Lora
from experiments.methods.snella import PlusSnella, ReleasedSnella, Snella
from experiments.tasks import catalogue, fgvc, vtab

AnyConfig = TypeVar("AnyConfig", bound=RunConfig, covariant=True)


@dataclasses.dataclass(frozen=True)
class Preset(Generic[AnyConfig]):
    """A config, and what it is in a line."""

    text: str
    config: AnyConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """The released code's settings for a task.

    Attributes:
      sparsity: target of `1 - density`; None for Mix-K without any sparsity.
      derived: it is SNELL's.
    """

    batch: int
    weight_decay: float
    sparsity: float | None
    epochs: int = 100
    lr: float = 1e-3
    derived: bool = False


RELEASED_VTAB = {
    "caltech101": Row(16, 1e-4, None),
    "cifar100": Row(8, 0.05, 0.80),
    "dtd": Row(8, 5e-3, 0.93),
    "oxford_flowers102": Row(8, 1e-3, 0.40),
    "oxford_iiit_pet": Row(16, 0.05, 0.55),
    "svhn": Row(16, 1e-4, None),
    "sun397": Row(32, 1e-3, 0.99, epochs=200, derived=True),
    "patch_camelyon": Row(8, 5e-4, 0.76),
    "eurosat": Row(16, 4e-4, 0.5, derived=True),
    "resisc45": Row(32, 0.01, 0.0, derived=True),
    "diabetic_retinopathy": Row(32, 0.05, 0.20),
    "clevr_count": Row(16, 0.01, 0.1, derived=True),
    "clevr_dist": Row(16, 1e-3, 0.74, derived=True),
    "dmlab": Row(8, 1e-4, 0.0, derived=True),
    "kitti_dist": Row(8, 0.01, 0.37, derived=True),
    "dsprites_loc": Row(16, 0.01, 0.0, derived=True),
    "dsprites_ori": Row(8, 0.01, 0.88, derived=True),
    "smallnorb_azi": Row(16, 0.01, 0.0, derived=True),
    "smallnorb_ele": Row(32, 1e-3, 0.63),
}
RELEASED_FGVC = {
    "cub": Row(16, 0.05, 0.30),
    "nabirds": Row(32, 5e-4, 0.16),
    "flowers": Row(16, 1e-3, 0.61),
    "dogs": Row(32, 5e-3, 0.24, lr=1e-4),
    "cars": Row(16, 0.05, None),
}

QUICKSTART = Preset(
    "digits, a small ViT, on a laptop CPU",
    ImageConfig(),
)


def _released(
    task: str, row: Row, initial_sparsity: float, **changes
) -> Preset[ImageConfig]:
    dense = row.sparsity is None
    density = round(1 - (row.sparsity or 0.0), 4)
    released = ReleasedSnella(
        lr=row.lr,
        weight_decay=row.weight_decay,
        rank=32,
        initial_density=max(density, round(1 - initial_sparsity, 4)),
        target_density=density,
        gate="none" if dense else "released",
    )
    settings: dict[str, Any] = dataclasses.asdict(released)
    config = ImageConfig(
        task=task,
        model="ViT-B_16.npz",
        image_size=224,
        protocol="final",
        epochs=row.epochs,
        warmup_epochs=10,
        cooldown_epochs=10,
        eval_every=10,
        batch=row.batch,
        drop_path=0.1,
        settings={"lora": Lora(lr=1e-3), "snella": Snella(**settings)},
        source=f"the released code: {'SNELL-32' if row.derived else 'SNELLA-32'}",
        **changes,
    )
    return Preset(catalogue.ENTRIES[task].group, config)


def _local(task: str) -> Preset[ImageConfig]:
    """A set that needs no network, with the real ViT-S/14 at a size for a CPU."""
    config = ImageConfig(
        task=task,
        model="dinov2_saliency",
        image_size=112,
        epochs=8,
        warmup_epochs=1,
        settings={
            "lora": Lora(lr=1e-3),
            "snella": Snella(lr=3e-3),
            "snella_plus": PlusSnella(lr=1e-3),
        },
    )
    return Preset("no network; a real ViT-S/14", config)


VTAB: dict[str, Preset[ImageConfig]] = {
    "quickstart": QUICKSTART,
    **{task: _local(task) for task in catalogue.LOCAL if task != "digits"},
    **{task: _released(task, RELEASED_VTAB[task], 0.01) for task in vtab.TASKS},
}
FGVC: dict[str, Preset[ImageConfig]] = {
    task: _released(task, RELEASED_FGVC[task], 0.0, crop="random", ema=0.9999)
    for task in fgvc.TASKS
}
SUITES = {"vtab1k": tuple(vtab.TASKS), "fgvc": tuple(fgvc.TASKS)}
