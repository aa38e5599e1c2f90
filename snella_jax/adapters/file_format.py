"""Adapters as files: what is written, and what has to hold when it is read.

A folder as PEFT's users know it: `adapter_config.json` and `adapter_model.safetensors`
(keys `base_model.model.PATH.snella_a`, ...; `base_model.model.PATH` for what else
trained). The config has a SHA-256 of every tensor and a fingerprint of every weight of
the base, the tensors' file has the config's SHA-256: nothing can change or be swapped
unnoticed. Format 1 knows the base by its adapted weights alone.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from snella_jax import kernels
from snella_jax.adapters import fingerprint
from snella_jax.adapters.base import Base
from snella_jax.adapters.fingerprint import Digest, Fingerprint, sha256
from snella_jax.core.config import Rule
from snella_jax.core.weight import AdaptedWeight, indexed
from snella_jax.files.atomic import check_exchangeable, leftovers, whole_folder
from snella_jax.files.errors import CheckpointError
from snella_jax.files.hosts import once, to_host
from snella_jax.files.readers import read_json, read_safetensors
from snella_jax.files.tensors import write_tensors
from snella_jax.version import __version__

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FORMAT, READ = 2, (1, 2)
PREFIX = "base_model.model."
# Fields of a rule that are not written: the next training may set them anew.
OF_TRAINING = ("sketch", "sketch_kind", "keep_rows", "implementation")
# Fields of kernels that are written only where they differ from these values, so that
# files without them stay as they were.
LATER = {"centred": "none", "start": "kernel"}


@dataclasses.dataclass(frozen=True)
class Unit:
    """The adapter of one weight, or of one row of a stacked weight, in a file.

    Attributes:
      rule: rank, kernel, gate and path of the update.
      must_move: as in `Site`.
      shape: `(*slices, n, m)`.
      factors: factors with the leading axes `slices`.
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
    base: Digest | Fingerprint


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """The contents of an adapter's folder, checked against themselves.

    Attributes:
      folder: folder that was read.
      units: adapters by name: the path of the layer, with the row of stacked blocks.
      trained: other variables that trained, by path.
      stats: running statistics, by path.
      rest: fingerprints of all else of the base; None in format 1.
      base: name of the base model when it was written, or None.
    """

    folder: Path
    units: dict[str, Unit]
    trained: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]
    rest: Base | None
    base: str | None


def write(
    folder: str | Path,
    weights: Iterable[AdaptedWeight],
    trained: Mapping[str, Any],
    stats: Mapping[str, Any],
    model: Base,
    base: str | None = None,
) -> None:
    """Writes an adapter; the folder is whole, or as it was before.

    An adapter that is there is replaced. Where arrays are spread over several processes
    all of them have to call this, and the first writes: what is written is gathered,
    the base is not.

    Args:
      folder: folder to write; its parents are made, too.
      weights: adapted weights.
      trained: other variables that trained, by path.
      stats: running statistics, by path.
      model: base without adapters; also what is adapted, trained or in `stats`.
      base: name of the base model, for readers.

    Raises:
      FileExistsError: `folder` is there and holds something else than an adapter.
      ValueError: a kernel that is none of `snella.kernels`, or two paths that would
        have one key.
    """
    folder = Path(folder)
    once(lambda: check_free(folder))
    weights = list(weights)
    tensors = _tensors(weights, trained, stats)
    described = {weight.path: _described(weight) for weight in weights}
    rest = model.rest(described, {**trained, **stats}).fingerprints()

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
        "rest_of_base": rest.as_json(),
        "tensors": {key: sha256(value) for key, value in tensors.items()},
    }
    content = json.dumps(config, indent=1, default=_plain).encode() + b"\n"
    metadata = {"format": "pt", "config_sha256": _sha256(content)}

    def save() -> None:
        check_free(folder)  # still
        with whole_folder(folder) as new:
            (new / CONFIG).write_bytes(content)
            write_tensors(tensors, new / TENSORS, metadata)

    once(save)


def read(folder: str | Path) -> AdapterFile:
    """Reads an adapter and checks it against itself.

    Raises:
      FileNotFoundError: there is none.
      CheckpointError: a file is damaged, or not what was written; says which.
    """
    folder = Path(folder)
    check_there(folder)
    path = folder / CONFIG
    config = read_json(path)
    if (kind := config.get("peft_type")) != "SNELLA":
        raise CheckpointError(
            path,
            f"peft_type is {kind!r}: expected 'SNELLA'"
            + (", or snella.load_peft, which reads PEFT's LoRA" * (kind == "LORA")),
        )
    if config.get("snella_format") not in READ:
        raise CheckpointError(
            path,
            f"snella_format is {config.get('snella_format')!r}: this version of "
            f"snella_jax reads {' and '.join(map(str, READ))}",
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


def check_there(folder: Path) -> None:
    """Raises a `FileNotFoundError` for a folder without; says where one may be."""
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            whole = [p for p in leftovers(folder) if (p / CONFIG).is_file()]
            beside = "".join(
                f" A save that was cut off left {other}: move it to {folder}."
                for other in whole
                if (other / TENSORS).is_file()
            )
            raise FileNotFoundError(f"There is no {folder / name}.{beside}")


def _sha256(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _key(path: str, name: str = "") -> str:
    return PREFIX + ".".join(filter(None, (path.replace("/", "."), name)))


def _tensors(
    weights: Iterable[AdaptedWeight],
    trained: Mapping[str, Any],
    stats: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Collects the tensors of an adapter, by key."""
    found: dict[str, np.ndarray] = {}
    for weight in weights:
        for name, value in weight.factors.items():
            _put(found, _key(weight.path, f"snella_{name}"), to_host(value))
    for path, value in (*trained.items(), *stats.items()):
        _put(found, _key(path), to_host(value))
    return found


def _put(tensors: dict[str, np.ndarray], key: str, value: np.ndarray) -> None:
    if key in tensors:
        raise ValueError(f"Two paths would have the key {key}: rename a module.")
    tensors[key] = value


def _described(weight: AdaptedWeight) -> dict[str, Any]:
    site = weight.site
    layout = site.layout
    dtype, places = fingerprint.of_rows(weight.w0, layout, site.axes)
    return {
        "rule": _rule_as_json(site.rule),
        "must_move": site.must_move,
        "stack": list(site.stack),
        "slices": list(layout.slices),
        "shape": [layout.n, layout.m],
        "budgets": to_host(weight.budget).tolist(),
        "allocated_at": to_host(weight.allocated_at).tolist(),
        "thresholds": to_host(weight.thresholds()).tolist(),
        "base_dtype": dtype,
        "base_places": [fingerprint.as_hex(row) for row in places],
    }


def _plain(value: Any) -> Any:
    """Returns a NumPy number or a path as JSON has it."""
    return value.item() if isinstance(value, np.generic) else os.fspath(value)


def _density(described: Iterable[Mapping[str, Any]]) -> float:
    """Returns the share of the weights that may move."""
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
    names = [f.name for f in dataclasses.fields(Rule) if f.name not in OF_TRAINING]
    fields = {name: getattr(rule, name) for name in names}
    settings = {
        field: value
        for field, value in dataclasses.asdict(kernel).items()
        if LATER.get(field) != value
    }
    return fields | {"kernel": {"name": name} | settings}


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
    old = config["snella_format"] == 1
    rest = None if old else Base.from_json(config["rest_of_base"])
    base = config["base_model_name_or_path"]
    return AdapterFile(folder, units, trained, stats, rest, base)


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
            base,
        )
        for row, base in zip(np.ndindex(stack), _bases(own), strict=True)
    }


def _bases(own: Mapping[str, Any]) -> list[Digest | Fingerprint]:
    """Reads which weight each row was trained on."""
    shape = (*own["slices"], *own["shape"])
    dtype = str(np.dtype(own["base_dtype"]))
    if "base_sha256" in own:
        return [Digest(dtype, {**row, dtype: row[dtype]}) for row in own["base_sha256"]]
    rows = map(fingerprint.of_hex, own["base_places"])
    return [Fingerprint(dtype, shape, {**row, dtype: row[dtype]}) for row in rows]


def check_free(folder: Path, *names: str) -> None:
    """Raises a `FileExistsError` if a folder holds something else than an adapter.

    Args:
      folder: folder to write.
      names: files that it may hold beside those of every adapter.
    """
    check_exchangeable(folder)
    if folder.is_dir():
        known = {CONFIG, TENSORS, *names}
        other = sorted(p.name for p in folder.iterdir() if p.name not in known)
        if other:
            raise FileExistsError(
                f"{folder} holds {', '.join(other[:5])}, which is no part of an "
                "adapter: give the adapter a folder of its own."
            )
    elif folder.exists():
        raise FileExistsError(f"{folder} is no folder.")
