"""Names that transformers, diffusers or timm have for the numbers of a model.

PyTorch's adapters name modules as they are in memory. In transformers 5 these are not
always the names in files: `vit.layers.0.attention.q_proj` is in a file still
`vit.encoder.layer.0.attention.attention.query`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from snella_jax.files.arrays import Stored
from snella_jax.models.checkpoints.formats import TorchFormat
from snella_jax.models.checkpoints.mapping import TensorRule, place_of, places, stored
from snella_jax.models.checkpoints.read import read
from snella_jax.models.checkpoints.torch_tensor import Row, TorchTensor
from snella_jax.models.export import tensors as exported
from snella_jax.models.registry import Model, family_of


def format_of(model: Model) -> TorchFormat:
    """Returns the names of a model's tensors, and its rows for them.

    Raises:
      ValueError: there is no such model elsewhere (a SAM with a TinyViT).
    """
    return family_of(model).torch(model.config)


def shapes(model: Model, like: str | Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a checkpoint's tensors, by their names in memory.

    Raises:
      FileNotFoundError, CheckpointError: as `models.load`.
    """
    names, found = format_of(model), read(like).tensors
    return {names.in_memory(name): tuple(x.shape) for name, x in found.items()}


def tensors(model: Model, like: str | Path | None) -> dict[str, Stored]:
    """Returns a plain model's tensors, by their names in memory.

    As `models.export` writes them: with the name of the whole where a head is new.

    Raises:
      FileNotFoundError, CheckpointError, ValueError: as `models.export`.
    """
    names, found = format_of(model), exported(model, like)
    return {names.in_memory(name): tensor for name, tensor in found.items()}


def located(model: Model, names: Iterable[str]) -> dict[str, TorchTensor]:
    """Finds the rows of a plain model for tensors, in memory or in a file.

    Whatever stands before the names that the format has is passed over.

    >>> from flax import nnx
    >>> from snella_jax import models
    >>> model = nnx.eval_shape(lambda: models.create("vit_ti16", rngs=nnx.Rngs(0)))
    >>> name = "vit.layers.3.attention.q_proj.weight"
    >>> located(model, [name, "other"])[name].rows
    [Row(path='blocks/attn/query/kernel', at=(3,))]

    Returns:
      Tensors by name, without those that the model has no place for.
    """
    form = format_of(model)
    rooms = places(stored(model), form.stacked)
    found = {}
    for name in names:
        for rule, paths in _candidates(name, form):
            parts = [form.part(path) for path in paths]
            if all(part in rooms for part in parts):
                rows = [_row(*rooms[part][:2]) for part in parts]
                found[name] = TorchTensor(rule, rows)
                break
    return found


def _row(variable: str, index: int | None) -> Row:
    return Row(variable, () if index is None else (index,))


def _candidates(
    name: str, form: TorchFormat
) -> Iterator[tuple[TensorRule, tuple[str, ...]]]:
    """Yields the rules that may be meant, for a name with an unknown beginning."""
    while name:
        for written in dict.fromkeys((name, form.in_file(name))):
            try:
                yield place_of(written, form.rules)
            except ValueError:
                continue
        first, _, name = name.partition(".")
        if first.isdigit():  # of a list of layers: what follows is no beginning
            return
