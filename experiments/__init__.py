"""The paper's experiments, run from a clone: `python -m experiments.vtab --help`."""

import importlib.util

_missing = [
    name
    for name in ("matplotlib", "rich", "safetensors", "sklearn", "tyro")
    if importlib.util.find_spec(name) is None
]
if _missing:
    raise ModuleNotFoundError(
        f"The experiments need {', '.join(_missing)}: run "
        'pip install -e ".[experiments]" in the clone.'
    )
