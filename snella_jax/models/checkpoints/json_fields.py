"""Checked values of the fields of config files in JSON; null counts as absent."""

import sys
from collections.abc import Collection, Mapping
from typing import Any


def only(said: Mapping[str, Any], expected: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises a `ValueError` for a field that is there with a value it must not have.

    Args:
      said: a config's fields.
      expected: values that are allowed, by field; the first is the one that is meant.
    """
    for name, values in expected.items():
        if said.get(name) is not None and said[name] not in values:
            raise ValueError(f"{name}={said[name]!r}: expected {values[0]!r}")


def unknown(said: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Returns the fields that are there and not known; a library's `_NAME` are none.

    >>> unknown({"width": 8, "depth": None, "_class_name": "A", "odd": 0}, {"width"})
    ['odd']
    """
    return [
        name
        for name, value in said.items()
        if value is not None and name not in known and not name.startswith("_")
    ]


def count(said: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Returns a positive integer; without a default it has to be there.

    Raises:
      ValueError: it is missing, or anything else.
    """
    value = _given(said, name, default)
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{name}={value!r}: expected a positive integer")
    return value


def number(said: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Returns a positive number; default and errors as in `count`."""
    value = _given(said, name, default)
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name}={value!r:.40}: expected a positive number")
    return float(value)


def flag(said: Mapping[str, Any], name: str) -> bool:
    """Returns a truth value, False if it is absent.

    Raises:
      ValueError: it is anything else.
    """
    value = said.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected true or false")
    return bool(value)


def _given(said: Mapping[str, Any], name: str, default: Any) -> Any:
    value = said.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"there is no {name}")
    return value
