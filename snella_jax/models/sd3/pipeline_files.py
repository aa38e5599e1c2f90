"""Published weights of a whole pipeline: a folder of diffusers, or a single file."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import DTypeLike

from snella_jax.files.errors import CheckpointError
from snella_jax.files.readers import read_json
from snella_jax.models.checkpoints.json_fields import number, only
from snella_jax.models.checkpoints.read import Checkpoint
from snella_jax.models.checkpoints.read import read as read_checkpoint
from snella_jax.models.sd3 import clip, flow, mmdit, vae
from snella_jax.models.sd3.mesh import automatic, placed
from snella_jax.models.sd3.pipeline import Pipeline
from snella_jax.models.sd3.single_file import (
    FOLDERS,
    PIPELINE,
    PREFIXES,
    component,
    parts_in,
)
from snella_jax.models.sd3.t5 import T5Config
from snella_jax.models.sd3.t5 import load as load_t5
from snella_jax.models.sd3.text import TextEncoders
from snella_jax.models.sd3.tokenizers import clip_tokenizer, t5_tokenizer

KIND = "StableDiffusion3Pipeline"
CLIPS = ("clip_l", "clip_g")
OF_FOLDER = {**FOLDERS, "tokenizer": "tokenizer", "t5_tokenizer": "tokenizer_3"}
# Classes of a folder's components, as its index names them.
CLASSES = {
    "transformer": ("SD3Transformer2DModel",),
    "vae": ("AutoencoderKL",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    "text_encoder": ("CLIPTextModelWithProjection",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "text_encoder_3": ("T5EncoderModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_3": ("T5Tokenizer", "T5TokenizerFast"),
}
# File that each folder has; `config.json` where none is named.
CONFIGS = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_3": "tokenizer_config.json",
}
# Fields of the scheduler's config that have to be so, or absent.
ONLY: dict[str, tuple[Any, ...]] = {
    "_class_name": ("FlowMatchEulerDiscreteScheduler",),
    "num_train_timesteps": (flow.STEPS,),
    "use_dynamic_shifting": (False,),
    "invert_sigmas": (False,),
    "shift_terminal": (None,),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "stochastic_sampling": (False,),
}


def load(
    path: str | Path,
    *,
    t5: bool | str | Path = True,
    clip_l: str | Path | None = None,
    clip_g: str | Path | None = None,
    tokenizer: str | Path | None = None,
    t5_tokenizer: str | Path | None = None,
    t5_length: int = 256,
    text_on: Literal["device", "host"] = "device",
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    **overrides: Any,
) -> Pipeline:
    """Loads Stable Diffusion 3 with published weights.

    Args:
      path: a folder of diffusers, with `model_index.json`, or a single file:
        `sd3_medium.safetensors`, `sd3_medium_incl_clips.safetensors` and so on.
      t5: True for T5 beside the two CLIPs, False for zeros in its place, or its path.
      clip_l, clip_g: paths of the CLIPs; None for those in `path`.
      tokenizer: path of CLIP's tokenizer; None for the folder's, and with a single file
        for the one in the package `open-clip-torch`.
      t5_tokenizer: path of T5's tokenizer; None for the folder's.
      t5_length: T5's tokens: 256 in diffusers' pipeline, 77 in its training script.
      text_on: "host" keeps the text encoders in the memory of the CPU, which then
        computes them; `Pipeline.without_encoders` drops them.
      dtype: dtype of the computation, but of the VAE's, which is float32; None for
        float32.
      param_dtype: dtype of the weights, but of the VAE's; None for float32.
      mesh: as of `Pipeline`.
      overrides: other fields of `MMDiTConfig`, such as `remat`.

    Raises:
      FileNotFoundError: there is nothing at a path.
      CheckpointError: a file is damaged, a download is not whole, or it is not Stable
        Diffusion 3; names the file.
      ModuleNotFoundError: a package of the extra `generation` is missing; says which.
      ValueError: a component is not in `path` and has no path of its own, or an option
        that cannot be.
    """
    if text_on not in ("device", "host"):
        raise ValueError(f'text_on={text_on!r}: expected "device" or "host".')
    mesh = None if mesh is None else automatic(mesh)
    given = {"clip_l": clip_l, "clip_g": clip_g, "tokenizer": tokenizer}
    given |= {"t5_tokenizer": t5_tokenizer, "t5": None if t5 is True else t5}
    shift, paths = _found(Path(path), given)
    tokenizers = _tokenizers(paths, t5_length)
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    device = _host() if text_on == "host" else None
    if "t5" in paths and dtype is not None:
        T5Config(dtype=dtype)  # raises if there is no T5 of this dtype
    # Every file is looked at before the first is read whole, which takes minutes.
    read = {part: component(paths[part], part) for part in PREFIXES if part in paths}
    # First what tells Stable Diffusion 3.5 apart, last T5, which takes longest.
    transformer = mmdit.load(read["mmdit"], **dtypes, **overrides)
    autoencoder = vae.load(read["vae"])
    towers = _towers(read, device, mesh, dtypes)
    width = transformer.config.context_dim
    encoders = TextEncoders(**towers, **tokenizers, t5_length=t5_length, width=width)
    return Pipeline(transformer, autoencoder, encoders, shift=shift, mesh=mesh)


def _towers(
    read: Mapping[str, Checkpoint],
    device: Any,
    mesh: Mesh | None,
    dtypes: Mapping[str, Any],
) -> dict[str, Any]:
    """Loads the text encoders; None for a T5 without files.

    Args:
      device: device that they are to stay on; None for the mesh, or JAX's default.
    """
    with contextlib.nullcontext() if device is None else jax.default_device(device):
        towers: dict[str, Any] = {
            part: clip.load(read[part], part=part, **dtypes) for part in CLIPS
        }
        if "t5" in read:
            towers["t5"] = load_t5(read["t5"], **dtypes)
    for part, tower in towers.items():
        towers[part] = (
            placed(tower, mesh) if device is None else _committed(tower, device)
        )
    return {"t5": None} | towers


def _host() -> Any:
    """Returns the host's device.

    Raises:
      ValueError: JAX was told not to use it.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ValueError(
            'text_on="host" needs JAX\'s backend for CPUs: add cpu to JAX_PLATFORMS, '
            "as in JAX_PLATFORMS=cuda,cpu."
        ) from error


def _committed(model: Any, device: Any) -> Any:
    """Returns a model that computes on the device that its weights are on."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.device_put(state, SingleDeviceSharding(device)))


def _tokenizers(paths: Mapping[str, Path], t5_length: int) -> dict[str, Any]:
    found = {"clip_tokenizer": clip_tokenizer(paths.get("tokenizer"))}
    if "t5" in paths:
        found["t5_tokenizer"] = t5_tokenizer(paths["t5_tokenizer"], t5_length)
    return found


def _found(path: Path, given: Mapping[str, Any]) -> tuple[float, dict[str, Path]]:
    """Returns the shift of the noise levels, and the paths of components by name.

    Args:
      path: folder or single file.
      given: paths that stand in the place of those in `path`; None for these, and False
        for a T5 that is not wanted.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no pipeline at {path}.")
    own = {name: Path(value) for name, value in given.items() if value}
    wanted = {"mmdit", "vae", *given} - own.keys()
    if given["t5"] is False:
        wanted -= {"t5", "t5_tokenizer"}
    find = _of_folder if path.is_dir() else _of_file
    shift, paths = find(path, wanted)
    return shift, paths | own


def _of_folder(folder: Path, names: set[str]) -> tuple[float, dict[str, Path]]:
    """Finds components in a folder of diffusers; also returns its shift.

    Raises:
      CheckpointError: it is no such folder, or not whole; lists what it lacks.
    """
    if not (folder / PIPELINE).exists():
        raise CheckpointError(
            folder,
            f"it has no {PIPELINE}: expected a folder of a diffusers pipeline, or a "
            "single file such as sd3_medium.safetensors",
        )
    index = read_json(folder / PIPELINE)
    kind = index.get("_class_name")
    if kind != KIND:
        raise CheckpointError(folder, f"a pipeline {kind!r}: expected {KIND!r}")
    problems = []
    for name in sorted({"scheduler", *(OF_FOLDER[name] for name in names)}):
        said = index.get(name)
        wanted = said[1] if isinstance(said, list) and len(said) == 2 else None
        if wanted not in CLASSES[name]:
            without = " (t5=False goes without T5)" if name.endswith("_3") else ""
            problems.append(
                f"{PIPELINE} says {name}={wanted!r}: expected {CLASSES[name][0]!r}"
                + without
            )
        elif not (folder / name / CONFIGS.get(name, "config.json")).exists():
            file = f"{name}/{CONFIGS.get(name, 'config.json')}"
            problems.append(f"there is no {file}: its download is not complete")
    if problems:
        raise CheckpointError(folder, "\n  ".join(["it is not whole:", *problems]))
    return _shift(folder), {name: folder / OF_FOLDER[name] for name in names}


def _shift(folder: Path) -> float:
    path = folder / "scheduler" / CONFIGS["scheduler"]
    said = read_json(path)
    try:
        only(said, ONLY)
        return number(said, "shift")
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error


def _of_file(path: Path, names: set[str]) -> tuple[float, dict[str, Path]]:
    """Finds components in a single file; also returns the published shift.

    Raises:
      CheckpointError: it is damaged, or holds none.
      ValueError: it lacks a text encoder or tokenizer that needs a path then.
    """
    held = parts_in(read_checkpoint(path))
    if lacks := [PREFIXES[part] for part in ("mmdit", "vae") if part not in held]:
        raise CheckpointError(
            path,
            f"it holds no {' and no '.join(lacks)}: expected a single file such as "
            "sd3_medium.safetensors, or a folder of a diffusers pipeline",
        )
    missing = sorted(names - {*held, "tokenizer"})
    if missing:
        paths = ", ".join(f"{name}=PATH" for name in missing)
        without = (
            " t5=False goes without T5." if any("t5" in m for m in missing) else ""
        )
        raise ValueError(
            f"{path} holds {', '.join(held)}, and no {', '.join(missing)}: expected "
            f"{paths}.{without}"
        )
    return flow.SHIFT, dict.fromkeys(names - {"tokenizer"}, path)
