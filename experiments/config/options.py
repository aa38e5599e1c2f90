"""Dataclasses as options of a command line: flat, in panels, with their help texts."""

import ast
import dataclasses
import functools
import inspect
import shutil
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro


@dataclasses.dataclass(frozen=True)
class Option:
    """A flag.

    Attributes:
      flag: name without dashes; dots for fields of fields.
      type: annotation of the field.
      default: value without the flag.
      text: docstring of the field, in one line.
      panel: title of its panel in the help.
      hidden: True if only the help of its method shows it.
    """

    flag: str
    type: Any
    default: Any
    text: str
    panel: str
    hidden: bool = False


def of(
    instance: Any,
    panel: str,
    prefix: str = "",
    hidden: Collection[str] = (),
    cls: type | None = None,
    skip: Collection[str] = (),
) -> Iterator[Option]:
    """Yields the options of a dataclass's instance, and of the dataclasses in it.

    Args:
      instance: has the defaults.
      panel: title of their panel.
      prefix: before every flag.
      hidden: names of fields that the help leaves out.
      cls: class whose fields are options; that of the instance by default.
      skip: names of fields that are no options.
    """
    cls = cls or type(instance)
    texts = _documented(cls) | _documented(type(instance))  # which may say it anew
    for field in dataclasses.fields(cls):
        value, flag = getattr(instance, field.name), f"{prefix}{field.name}"
        if field.name in skip:
            continue
        if dataclasses.is_dataclass(value):
            yield from of(value, panel, f"{flag}.")
        else:
            text = texts.get(field.name, "")
            own = field.name in hidden
            yield Option(flag, field.type, value, text, panel, own)


def replaced(instance: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Returns a copy of a dataclass's instance with the values of its flags."""
    changes = {}
    for field in dataclasses.fields(instance):
        value, flag = getattr(instance, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            changes[field.name] = replaced(value, values, f"{flag}.")
        elif flag in values:
            changes[field.name] = values[flag]
    return dataclasses.replace(instance, **changes)


def parse(
    program: str, options: Iterable[Option], words: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the value of every option, by flag, and the words that are no option.

    Raises:
      SystemExit: a value does not fit its option, as tyro has said on stderr.
    """
    options = list(options)
    found, rest = tyro.cli(
        _struct(options, {o.flag: _named(o) for o in options}),
        prog=program,
        args=words,
        return_unknown_args=True,
        use_underscores=True,
    )
    values = {o.flag: getattr(getattr(found, o.panel), _name(o)) for o in options}
    return values, rest


def show(
    program: str, options: Iterable[Option], text: str, brief: bool = False
) -> None:
    """Prints the help of some options below a text, with defaults in brackets.

    Args:
      program: command, as users call it.
      options: in the order of the help.
      text: stands above them.
      brief: leave out hidden options and lists of choices.
    """
    shown = [option for option in options if not (brief and option.hidden)]
    help_of = {o.flag: _named(o, _hint(o), _metavar(o) if brief else None)
               for o in shown}  # fmt: skip
    width = shutil.get_terminal_size().columns
    lines = [textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False)
             for line in text.splitlines()]  # fmt: skip
    try:
        tyro.cli(
            _struct(shown, help_of),
            prog=program,
            description="\n".join(lines),
            args=["--help"],
            use_underscores=True,
        )
    except SystemExit as end:
        if end.code:
            raise


@functools.cache
def _documented(cls: type) -> dict[str, str]:
    """Returns the docstrings of a dataclass's fields, in a line each."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            source = textwrap.dedent(inspect.getsource(base))
            (body,) = ast.parse(source).body
            texts |= _texts(body)
    return texts


def _texts(body: Any) -> Iterator[tuple[str, str]]:
    for field, text in zip(body.body, body.body[1:], strict=False):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str() as found)),
            ):
                yield name, " ".join(found.split())


def _struct(options: list[Option], types: Mapping[str, Any]) -> Any:
    """Returns a dataclass of a dataclass for each panel, as tyro takes it."""
    panels: dict[str, list[tuple[str, Any, Any]]] = {}
    for option in options:
        default = dataclasses.field(default_factory=lambda o=option: o.default)
        field = _name(option), types[option.flag], default
        panels.setdefault(option.panel, []).append(field)
    fields = []
    for panel, own in panels.items():
        cls = dataclasses.make_dataclass(panel, own, namespace={"__doc__": ""})
        # Without a help, tyro would search the sources of modules for one.
        titled = Annotated[cls, tyro.conf.arg(help="")]
        fields.append((panel, titled, dataclasses.field(default_factory=cls)))
    return dataclasses.make_dataclass("Options", fields)


def _named(option: Option, hint: str | None = None, metavar: str | None = None) -> Any:
    """Returns the annotated type of an option; with a hint, as the help shows it."""
    arg = tyro.conf.arg(
        name=option.flag,
        prefix_name=False,
        help=option.text,
        help_behavior_hint=hint,
        metavar=metavar,
    )
    if hint is not None and option.default is False:
        return Annotated[option.type, arg, tyro.conf.FlagCreatePairsOff]
    return Annotated[option.type, arg]


def _hint(option: Option) -> str:
    """Returns the default as the help shows it; nothing for what is off or unset."""
    default = option.default
    if default is None or default is False or default in ("", ()):
        return ""
    many = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"[{many}]"


def _metavar(option: Option) -> str | None:
    """Returns a short name of the value; None for a flag without one."""
    kinds = [kind for kind in get_args(option.type) if kind is not type(None)]
    if option.type is bool:
        return None
    if get_origin(option.type) is tuple:
        return "..."
    kind = kinds[0] if kinds else option.type
    if Literal in (get_origin(option.type), get_origin(kind)):
        return "NAME"
    return {int: "INT", float: "FLOAT", str: "STR"}.get(kind, "PATH")


def _name(option: Option) -> str:
    return option.flag.replace(".", "__")
