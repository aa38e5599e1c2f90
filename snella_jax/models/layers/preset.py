"""Configs by name, and the error about a name that is none."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any


def named(
    name: str, presets: Mapping[str, Any], kind: str, where: str, **fields
) -> Any:
    """Returns a preset's config with some fields overridden.

    Args:
      name: name of the preset.
      presets: configs by name.
      kind: what they are configs of, for the error.
      where: name of `presets` in the library, for the error.

    Raises:
      ValueError: there is no such preset; the message has the nearest ones.
    """
    if name not in presets:
        near = difflib.get_close_matches(name, presets)
        guess = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"No {kind} is called {name!r}.{guess} {where} has all.")
    return replaced(presets[name], **fields)


def replaced(config: Any, **fields: Any) -> Any:
    """Returns a config with other values of some fields, its own or its encoder's.

    Args:
      config: a dataclass; one in its field `encoder` takes the fields that it does not
        have itself.
    """
    own = {field.name for field in dataclasses.fields(config)}
    inner = {name: fields.pop(name) for name in fields.keys() - own}
    if inner and "encoder" in own and "encoder" not in fields:
        fields["encoder"] = dataclasses.replace(config.encoder, **inner)
        inner = {}
    return dataclasses.replace(config, **fields, **inner)
