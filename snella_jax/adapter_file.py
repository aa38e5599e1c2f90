"""Adapters as files: what is written, and what has to hold when it is read.

A folder as PEFT's users know it: `adapter_config.json` and `adapter_model.safetensors`
(keys `base_model.model.PATH.snella_a`, ...; `base_model.model.PATH` for what else
trained). The config has a SHA-256 of every tensor and of every adapted weight of the
base, the tensors' file has the config's: nothing can change or be swapped unnoticed.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from snella_jax import kernels
from snella_jax.config import Rule
from snella_jax.hosts import once, to_host
from snella_jax.models.atomic import leftovers, whole_folder
from snella_jax.models.checkpoint_error import CheckpointError
from snella_jax.models.loading import read_json, read_safetensors
from snella_jax.weight import AdaptedWeight, indexed

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = 1
PREFIX = "base_model.model."
NARROWER = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)


@dataclasses.dataclass(frozen=True)
class Digest:
    """SHA-256 of a weight of the base: as it is, and rounded to narrower dtypes.

    Attributes:
      dtype: of the weight.
      sha256: by dtype: of the weight in it. `dtype`, and those of `NARROWER` that are.
    """

    dtype: str
    sha256: Mapping[str, str]

    @classmethod
    def of(cls, matrices: np.ndarray) -> "Digest":
        """Of matrices `[*slices, n, m]`."""
        own = matrices.dtype
        narrower = [d for d in NARROWER if d.itemsize < own.itemsize]
        found = {str(d): sha256(_rounded(matrices, d)) for d in (own, *narrower)}
        return cls(str(own), found)

    def matches(self, matrices: np.ndarray) -> bool:
        """Whether it is of these, or of what they are rounded versions of or round to.

        Float16 and bfloat16 cannot be told to be of one weight: then it is not.
        """
        known = self.sha256.get(str(matrices.dtype))
        if known is None:
            known = self.sha256[self.dtype]
            matrices = _rounded(matrices, np.dtype(self.dtype))
        return sha256(matrices) == known


@dataclasses.dataclass(frozen=True)
class Unit:
    """What a file says of one weight, or of one row of a stacked one.

    Attributes:
      rule: how it is adapted.
      must_move: as of `Site`.
      shape: `(*slices, n, m)`.
      factors: with the leading axes `slices`.
      budget: int32 `[*slices]`.
      allocated_at: int32 `[*slices]`.
      base: the weight it was trained on.
    """

    rule: Rule
    must_move: bool
    shape: tuple[int, ...]
    factors: dict[str, np.ndarray]
    budget: np.ndarray
    allocated_at: np.ndarray
    base: Digest


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """What a folder holds, checked against itself.

    Attributes:
      folder: where it was read.
      units: by name: the path of the layer, with the row where blocks are stacked.
      trained: what else trained, by path.
      stats: running statistics, by path.
      base: what the base model was called when it was written, or None.
    """

    folder: Path
    units: dict[str, Unit]
    trained: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]
    base: str | None


def write(
    folder: str | Path,
    weights: Iterable[AdaptedWeight],
    trained: Mapping[str, Any],
    stats: Mapping[str, Any],
    base: str | None = None,
) -> None:
    """Writes an adapter; the folder is whole, or as it was before.

    An adapter that is there is replaced. Arrays that are spread over several processes
    are gathered: then all of them have to call this, and the first writes.

    Args:
      folder: to be made; its parents, too.
      weights: adapted.
      trained: other variables that trained, by path.
      stats: running statistics, by path.
      base: what the base model is called, for readers.

    Raises:
      FileExistsError: `folder` is there and holds something else than an adapter.
      ValueError: a kernel that is none of `snella.kernels`, or two paths that would
        have one key.
    """
    folder = Path(folder)
    tensors: dict[str, np.ndarray] = {}
    described = {}
    for weight in weights:
        described[weight.path] = _described(weight)
        for name, value in weight.factors.items():
            _put(tensors, _key(weight.path, f"snella_{name}"), to_host(value))
    for path, value in (*trained.items(), *stats.items()):
        _put(tensors, _key(path), to_host(value))
    from snella_jax import __version__

    config = {
        "peft_type": "SNELLA",
        "snella_format": FORMAT,
        "snella_jax_version": __version__,
        "base_model_name_or_path": base,
        "target_modules": list(described),
        "modules_to_save": list(trained),
        "batch_stats": list(stats),
        "density": _density(described.values()),
        "weights": described,
        "tensors": {key: sha256(value) for key, value in tensors.items()},
    }
    content = json.dumps(config, indent=1).encode() + b"\n"
    metadata = {"format": "pt", "config_sha256": _sha256(content)}

    def save() -> None:
        _check_free(folder)
        with whole_folder(folder) as new:
            (new / CONFIG).write_bytes(content)
            save_file(tensors, new / TENSORS, metadata)

    once(save)


def read(folder: str | Path) -> AdapterFile:
    """Reads an adapter and checks it against itself.

    Raises:
      FileNotFoundError: there is none.
      CheckpointError: a file is damaged, or not what was written; says which.
    """
    folder = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            whole = [p for p in leftovers(folder) if (p / CONFIG).is_file()]
            beside = "".join(
                f" A save that was cut off left {other}: move it to {folder}."
                for other in whole
                if (other / TENSORS).is_file()
            )
            raise FileNotFoundError(f"There is no {folder / name}.{beside}")
    path = folder / CONFIG
    config = read_json(path)
    if config.get("peft_type") != "SNELLA":
        raise CheckpointError(
            path, f"peft_type is {config.get('peft_type')!r}: expected 'SNELLA'"
        )
    if config.get("snella_format") != FORMAT:
        raise CheckpointError(
            path,
            f"snella_format is {config.get('snella_format')!r}: this version of "
            f"snella_jax reads {FORMAT}",
        )
    tensors, metadata = read_safetensors(folder / TENSORS)
    expected = {"format": "pt", "config_sha256": _sha256(path.read_bytes())}
    if metadata != expected:
        raise CheckpointError(
            path,
            f"it is not the one that {TENSORS} was written with: damaged, edited, or "
            "of another adapter",
        )
    try:
        return _parsed(folder, config, tensors)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError.damaged(path, error) from error


def sha256(array: np.ndarray) -> str:
    """Of dtype, shape and numbers."""
    head = f"{array.dtype}{list(array.shape)}".encode()
    return _sha256(head, np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _rounded(matrices: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is infinite in float16 is no other weight
        return matrices.astype(dtype)


def _sha256(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _key(path: str, name: str = "") -> str:
    return PREFIX + ".".join(filter(None, (path.replace("/", "."), name)))


def _put(tensors: dict[str, np.ndarray], key: str, value: np.ndarray) -> None:
    if key in tensors:
        raise ValueError(f"Two paths would have the key {key}: rename a module.")
    tensors[key] = value


def _described(weight: AdaptedWeight) -> dict[str, Any]:
    site = weight.site
    layout, rows = site.layout, math.prod(site.stack)
    matrices = weight.matrices().reshape(rows, *layout.slices, layout.n, layout.m)
    digests = [Digest.of(row) for row in matrices]
    return {
        "rule": _rule_as_json(site.rule),
        "must_move": site.must_move,
        "stack": list(site.stack),
        "slices": list(layout.slices),
        "shape": [layout.n, layout.m],
        "budgets": to_host(weight.budget).tolist(),
        "allocated_at": to_host(weight.allocated_at).tolist(),
        "thresholds": to_host(weight.thresholds()).tolist(),
        "base_dtype": digests[0].dtype,
        "base_sha256": [digest.sha256 for digest in digests],
    }


def _density(described: Iterable[Mapping[str, Any]]) -> float:
    """Share of the weights that may move."""
    described = list(described)
    budgets = [np.asarray(one["budgets"]) for one in described]
    weights = [
        own.size * math.prod(one["shape"])
        for own, one in zip(budgets, described, strict=True)
    ]
    return sum(int(own.sum()) for own in budgets) / sum(weights)


def _rule_as_json(rule: Rule) -> dict[str, Any]:
    kernel: Any = rule.kernel
    name = type(kernel).__name__
    if kernels.KERNELS.get(name) is not type(kernel):
        raise ValueError(
            f"{kernel} is no kernel of snella.kernels: it cannot be written to a file."
        )
    fields = {f.name: getattr(rule, f.name) for f in dataclasses.fields(Rule)}
    return fields | {"kernel": {"name": name} | dataclasses.asdict(kernel)}


def _rule(given: Mapping[str, Any]) -> Rule:
    rule = dict(given)
    kernel = rule.pop("kernel")
    name, settings = kernel["name"], {k: v for k, v in kernel.items() if k != "name"}
    return Rule(kernel=kernels.KERNELS[name](**settings), **rule)


def _parsed(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> AdapterFile:
    if config["tensors"].keys() != tensors.keys():
        differ = sorted(config["tensors"].keys() ^ tensors.keys())
        raise CheckpointError(
            folder / TENSORS,
            f"expected the tensors of {CONFIG}; these differ: {differ}",
        )
    for key, expected in config["tensors"].items():
        if sha256(tensors[key]) != expected:
            raise CheckpointError(
                folder / TENSORS, f"{key} is not what was written: its SHA-256 differs"
            )
    units: dict[str, Unit] = {}
    for path, own in config["weights"].items():
        units |= _units(path, own, tensors)
    trained, stats = (
        {path: tensors[_key(path)] for path in config[name]}
        for name in ("modules_to_save", "batch_stats")
    )
    base = config["base_model_name_or_path"]
    return AdapterFile(folder, units, trained, stats, base)


def _units(
    path: str, own: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, Unit]:
    rule: Any = _rule(own["rule"])
    stack, slices = tuple(own["stack"]), tuple(own["slices"])
    prefix = _key(path, "snella_")
    factors = {
        key.removeprefix(prefix): value
        for key, value in tensors.items()
        if key.startswith(prefix)
    }
    n, m = own["shape"]
    expected = jax.eval_shape(
        lambda key: rule.kernel.init(key, (n, m), rule.rank), jax.random.key(0)
    )
    shapes = {name: stack + slices + value.shape for name, value in expected.items()}
    if {name: value.shape for name, value in factors.items()} != shapes:
        raise ValueError(f"the factors of {path} are not those of its rule")
    budget, since = (
        np.asarray(own[name], np.int32).reshape(stack + slices)
        for name in ("budgets", "allocated_at")
    )
    return {
        indexed(path, row): Unit(
            rule,
            own["must_move"],
            (*slices, n, m),
            {name: np.asarray(value[row]) for name, value in factors.items()},
            budget[row],
            since[row],
            Digest(own["base_dtype"], dict(digest)),
        )
        for row, digest in zip(np.ndindex(stack), own["base_sha256"], strict=True)
    }


def _check_free(folder: Path) -> None:
    if folder.is_dir():
        other = sorted(
            p.name for p in folder.iterdir() if p.name not in (CONFIG, TENSORS)
        )
        if other:
            raise FileExistsError(
                f"{folder} holds {', '.join(other[:5])}, which is no part of an "
                "adapter: give the adapter a folder of its own."
            )
    elif folder.exists():
        raise FileExistsError(f"{folder} is no folder.")
