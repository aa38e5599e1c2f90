"""Files of sparse differences between two sets of weights, for anyone to apply.

A file has, for every weight that changed, the places and the exclusive-or of the bits
before and after. So applying it is exact in any dtype, applying it again takes it back,
and NumPy needs a few lines for it (docs/adapters.md). SHA-256 of every weight before
and after, also of those that did not change, tell if it belongs to given weights.

    >>> import tempfile
    >>> base = {"fc": np.zeros((2, 3), np.float32)}
    >>> tuned = {"fc": np.float32([[0, 0, 1], [0, 0, 0]])}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/delta.safetensors"
    ...     save_delta(path, base, tuned)
    ...     there, back = apply_delta(base, path), unmerge(tuned, path)
    >>> there["fc"].tolist(), back["fc"].tolist()
    ([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx

from snella_jax.adapters.fingerprint import sha256
from snella_jax.core.placement import like
from snella_jax.files.atomic import whole_file
from snella_jax.files.errors import CheckpointError
from snella_jax.files.hosts import once, to_host
from snella_jax.files.readers import read_safetensors
from snella_jax.files.tensors import write_tensors
from snella_jax.nnx.variables import Factor, array_of, variables_of

log = logging.getLogger("snella_jax")
# Tensors of a weight, by how its places are written.
PARTS = {
    "whole": ("whole",),
    "everywhere": ("bits",),
    "indices": ("bits", "where"),
    "bitmap": ("bits", "where"),
}
W = TypeVar("W", bound=nnx.Module | Mapping[str, Any])


def save_delta(
    path: str | Path,
    before: nnx.Module | Mapping[str, Any],
    after: nnx.Module | Mapping[str, Any],
) -> None:
    """Writes what has changed between two sets of weights.

    Args:
      path: file to write, `.safetensors`.
      before: a plain model, or arrays by name (in PyTorch's names and shapes, say).
      after: the same after training: `snella.merge(model)`. Weights of a name or shape
        that `before` lacks (a new head) are written whole.

    Raises:
      ValueError: a weight is missing after, has another dtype, or still has an adapter;
        arrays are nested.
    """
    old, new = _arrays(before), _arrays(after)
    if missing := sorted(old.keys() - new.keys()):
        raise ValueError(f"These weights are gone: {', '.join(missing)}.")
    tensors: dict[str, np.ndarray] = {}
    described, unchanged = {}, {}
    for name, value in new.items():
        value = to_host(value)
        was = to_host(old[name]) if name in old else None
        if was is None or was.shape != value.shape:
            tensors[f"{name}:whole"] = value
            described[name] = {"where": "whole", "after": sha256(value)}
            continue
        if was.dtype != value.dtype:
            raise ValueError(f"{name} was {was.dtype} and is {value.dtype}: cast one.")
        kind, where, bits = _difference(was, value)
        if not bits.size:
            unchanged[name] = sha256(value)
            continue
        digests = {"before": sha256(was), "after": sha256(value)}
        described[name] = {"where": kind, **digests}
        tensors[f"{name}:bits"] = bits
        if where is not None:
            tensors[f"{name}:where"] = where
    same = json.dumps(unchanged)
    metadata = {
        "snella_delta": json.dumps(described),
        "snella_unchanged": same,
        "snella_unchanged_sha256": hashlib.sha256(same.encode()).hexdigest(),
    }

    def write() -> None:
        with whole_file(Path(path)) as made:
            write_tensors(tensors, made, metadata)

    once(write)


def apply_delta(
    weights: W, path: str | Path, *, allow_base_mismatch: bool = False
) -> W:
    """Returns a copy of the weights before as they are after: what `merge` gives.

    Args:
      weights: a plain model or arrays by name. A model keeps its own shapes: a new head
        has to be in it.
      path: file that `save_delta` wrote.
      allow_base_mismatch: if weights that it does not change are others than they
        were, log that instead of raising.

    Raises:
      CheckpointError: the file is damaged, or belongs to other weights; says which.
    """
    path = Path(path)
    return _changed(weights, path, ("before", "after"), allow_base_mismatch)


def unmerge(weights: W, path: str | Path, *, allow_base_mismatch: bool = False) -> W:
    """Returns a copy of the weights after as they were before: the base, bit for bit.

    Weights that were written whole had nothing before: they stay as they are in a
    model, and are left out of a mapping.

    Args, errors: as in `apply_delta`.
    """
    path = Path(path)
    return _changed(weights, path, ("after", "before"), allow_base_mismatch)


def _changed(weights: W, path: Path, ways: tuple[str, str], allowed: bool) -> W:
    described, unchanged, tensors = _read(path)
    (now, then), arrays = ways, dict(_arrays(weights))
    _check_unchanged(arrays, path, unchanged, allowed)
    plain = isinstance(weights, Mapping)
    for name, said in described.items():
        if said["where"] == "whole":
            if then == "after":
                arrays[name] = tensors[f"{name}:whole"]
            elif plain:
                arrays.pop(name, None)
            continue
        if name not in arrays:
            raise CheckpointError(path, f"these weights have no {name}")
        value = to_host(arrays[name])
        if sha256(value) != said[now]:
            raise CheckpointError(
                path, f"{name} is not the weight that it is for: its SHA-256 differs"
            )
        try:
            arrays[name] = _flipped(value, said["where"], name, tensors)
        except (ValueError, TypeError, IndexError) as error:
            raise CheckpointError.damaged(path, error) from error
        if sha256(arrays[name]) != said[then]:
            raise CheckpointError(path, f"damaged: {name} does not come out right")
    if plain:
        return cast(W, arrays)
    return _filled(weights, path, {name: arrays[name] for name in described})


def _check_unchanged(
    arrays: Mapping[str, Any],
    path: Path,
    unchanged: Mapping[str, str] | None,
    allowed: bool,
) -> None:
    """Raises a `CheckpointError` for weights that are others than they were."""
    if unchanged is None:
        log.warning(
            "%s was written before weights that it does not change were in it: whether "
            "they are those of its training was not compared",
            path,
        )
        return
    there = [name for name in unchanged if name in arrays]  # a mapping may have a part
    others = [n for n in there if sha256(to_host(arrays[n])) != unchanged[n]]
    if not others:
        return
    message = (
        f"it is for another base: {', '.join(others)}, which it does not change, "
        f"{'has' if len(others) == 1 else 'have'} another SHA-256"
    )
    if not allowed:
        hint = "allow_base_mismatch=True applies it all the same"
        raise CheckpointError(path, f"{message}. {hint}")
    log.warning("%s: %s", path, message)


def _difference(
    was: np.ndarray, value: np.ndarray
) -> tuple[str, np.ndarray | None, np.ndarray]:
    """Returns how places are written, the places, and the bits that change there."""
    one, other = (_bits(np.ascontiguousarray(x)) for x in (was, value))
    bits = one ^ other
    (indices,) = np.nonzero(bits)
    index_type = np.uint32 if bits.size < 2**32 else np.uint64
    bitmap = np.packbits(bits != 0)
    if indices.size == bits.size:
        return "everywhere", None, bits
    if indices.size * np.dtype(index_type).itemsize < bitmap.size:
        return "indices", indices.astype(index_type), bits[indices]
    return "bitmap", bitmap, bits[indices]


def _flipped(
    value: np.ndarray, kind: str, name: str, tensors: Mapping[str, np.ndarray]
) -> np.ndarray:
    new = np.array(value, order="C")
    flat, bits = _bits(new), tensors[f"{name}:bits"]
    if kind == "everywhere":
        flat ^= bits
        return new
    where = tensors[f"{name}:where"]
    if kind == "bitmap":
        where = np.unpackbits(where, count=flat.size).astype(bool)
    flat[where] ^= bits
    return new


def _bits(value: np.ndarray) -> np.ndarray:
    return value.reshape(-1).view(f"u{value.dtype.itemsize}")


def _read(
    path: Path,
) -> tuple[dict[str, Any], dict[str, str] | None, dict[str, np.ndarray]]:
    """Reads what a file says of weights that change, of others, and its tensors."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}.")
    tensors, metadata = read_safetensors(path)
    try:
        described = json.loads(metadata["snella_delta"])
        unchanged = _unchanged(metadata)
        expected = {
            f"{name}:{part}"
            for name, said in described.items()
            for part in PARTS[said["where"]]
        }
        for said in described.values():
            _ = said["after"], said["where"] == "whole" or said["before"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError.damaged(path, error) from error
    if expected != tensors.keys():
        raise CheckpointError(path, "damaged: its tensors are not those it lists")
    for name, said in described.items():
        whole = said["where"] == "whole"
        if whole and sha256(tensors[f"{name}:whole"]) != said["after"]:
            raise CheckpointError(path, f"damaged: the SHA-256 of {name} differs")
    return described, unchanged, tensors


def _unchanged(metadata: Mapping[str, str]) -> dict[str, str] | None:
    """Reads the SHA-256 of weights that do not change; None in an older file."""
    keys = "snella_unchanged", "snella_unchanged_sha256"
    if not any(key in metadata for key in keys):
        return None
    said, digest = (metadata[key] for key in keys)
    if hashlib.sha256(said.encode()).hexdigest() != digest:
        raise ValueError("what it says of unchanged weights is not what was written")
    return dict(json.loads(said))


def _arrays(weights: nnx.Module | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(weights, Mapping):
        if nested := sorted(k for k, v in weights.items() if isinstance(v, Mapping)):
            raise ValueError(
                f"{', '.join(nested)}: expected arrays by name, not nested; "
                'flax.traverse_util.flatten_dict(params, sep="/") makes them.'
            )
        return weights
    if any(True for _ in variables_of(weights, Factor)):
        raise ValueError("The model has adapters: give snella.merge(model).")
    return {
        path: array_of(path, variable)
        for kind in (nnx.Param, nnx.BatchStat)
        for path, variable in variables_of(weights, kind)
    }


def _filled(model: Any, path: Path, arrays: Mapping[str, Any]) -> Any:
    model = nnx.clone(model)
    variables = dict(variables_of(model, nnx.Variable))
    for name, value in arrays.items():
        if name not in variables or variables[name].shape != value.shape:
            raise CheckpointError(
                path, f"{name} has shape {list(value.shape)}: the model has no such"
            )
        old = variables[name]
        old.set_value(like(jnp.asarray(value), old[...]))
    return model
