"""SNELLA (arXiv 2510.24037): sparse fine-tuning with kernelized low-rank factors.

Every adapted kernel is `W0 + delta(a, b)`: a nonlinear kernel makes `delta` from two
low-rank factors, an exact threshold keeps its largest weights, matrices compete for how
many. Only the factors train, and `delta` is recomputed, never stored.

Axes: `n` inputs and `m` outputs of a matrix (`y = x @ W`, `W[n, m]`), `r` rank, `P`
pieces, `L` adapted matrices. *Density* is the fraction of weights that may move.
"""

from snella_jax import kernels
from snella_jax.core.budgets import allocate, budget_schedule
from snella_jax.core.config import Rule, SnellaConfig
from snella_jax.core.decay import decay_mask
from snella_jax.core.delta import sparse_delta
from snella_jax.core.dense import adapted, adapted_dense
from snella_jax.core.gates import sparsify
from snella_jax.core.importance import ImportanceState, importance, track_importance
from snella_jax.core.layout import Layout
from snella_jax.core.reallocation import (
    Reallocation,
    reallocate,
    steps_since_reallocation,
)
from snella_jax.core.weight import BudgetsNeverMoved
from snella_jax.files.errors import CheckpointError
from snella_jax.nnx.adapt import (
    adapt,
    adapted_weights,
    merge,
    merged_magnitude,
    partition,
    seed,
)
from snella_jax.nnx.delta_file import apply_delta, save_delta, unmerge
from snella_jax.nnx.export import export
from snella_jax.nnx.generation import generate, pictures
from snella_jax.nnx.inspection import Matrix, describe, parameters, sparsity
from snella_jax.nnx.labels import labels, stop_gradients
from snella_jax.nnx.multi_adapter import combine, per_example
from snella_jax.nnx.peft_loading import load_peft, merge_peft
from snella_jax.nnx.saving import load, save, unload
from snella_jax.nnx.variables import Budget, DropKey, Factor, Frozen
from snella_jax.ops.threshold import threshold
from snella_jax.tuning import Tuning
from snella_jax.version import __version__

__all__ = [
    "Budget",
    "BudgetsNeverMoved",
    "CheckpointError",
    "DropKey",
    "Factor",
    "Frozen",
    "ImportanceState",
    "Layout",
    "Matrix",
    "Reallocation",
    "Rule",
    "SnellaConfig",
    "Tuning",
    "__version__",
    "adapt",
    "adapted",
    "adapted_dense",
    "adapted_weights",
    "allocate",
    "apply_delta",
    "budget_schedule",
    "combine",
    "decay_mask",
    "describe",
    "export",
    "generate",
    "importance",
    "kernels",
    "labels",
    "load",
    "load_peft",
    "merge",
    "merge_peft",
    "merged_magnitude",
    "parameters",
    "partition",
    "per_example",
    "pictures",
    "reallocate",
    "save",
    "save_delta",
    "seed",
    "sparse_delta",
    "sparsify",
    "sparsity",
    "steps_since_reallocation",
    "stop_gradients",
    "threshold",
    "track_importance",
    "unload",
    "unmerge",
]
