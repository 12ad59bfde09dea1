"""The flags of `jfed run`, made of the dataclasses that its settings live in.

A field becomes a flag called by its short name (`--learning-rate`, not `--client.learning-rate`),
with its own type, default and description. What a field could hold that no command line can give,
a function, its flag leaves out; a field that could hold nothing else has no flag, nor has one with
the metadata `{"flag": False}`.
"""

import collections.abc
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import operator
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Union

import docstring_parser
import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from jfed.algorithms.optimizers import Argument
from jfed.errors import ConfigError
from jfed.models.ode_nets import Iterations, ODENetConfig
from jfed.models.presets import NetworkConfig
from jfed.tiers import tier_name


def parse_iterations(text: str) -> Iterations:
    """Reads 4 as 4 iterations in every stage, 3-2-2 as counts per stage."""
    try:
        # A leading minus is a sign, so that -1 is refused as a number, not as a text.
        counts = tuple(int(part) for part in (text.split("-") if text[:1] != "-" else [text]))
    except ValueError:
        raise ConfigError(
            f"iterations must look like 4, or like 3-2-2 for counts per stage, got {text!r}."
        ) from None
    return counts if len(counts) > 1 else counts[0]


def parse_argument(text: str) -> Argument:
    """Reads eps=0.001 as a name and a value: a number, true or false, or text."""
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise ConfigError(f"an optimizer's argument must look like eps=0.001, got {text!r}.")
    try:
        return name, json.loads(value.lower())
    except json.JSONDecodeError:
        return name, value


def _rule(
    kind: Any, metavar: str, read: Callable[[str], Any], write: Callable[[Any], str]
) -> Callable[[PrimitiveTypeInfo], PrimitiveConstructorSpec | None]:
    """Tyro's rule for a type that is one word on the command line."""

    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type != kind:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=lambda args: _refusing(read, args[0]),
            is_instance=lambda x: isinstance(x, int | tuple),
            str_from_instance=lambda x: [write(x)],
        )

    return rule


class _Refused(Exception):
    """Holds a ConfigError, which is a ValueError, for which tyro would have a text of its own."""


def _refusing(read: Callable[[str], Any], text: str) -> Any:
    try:
        return read(text)
    except ConfigError as error:
        raise _Refused from error


_RULES = (
    _rule(Iterations, "INT|INT-INT-...", parse_iterations, tier_name),
    _rule(Argument, "NAME=VALUE", parse_argument, lambda pair: "=".join(map(str, pair))),
)


def cli(kind: Any, **settings: Any) -> Any:
    """`tyro.cli`, but what it cannot read is one line of a ConfigError, not a box of lines."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, **settings)
    except _Refused as refused:
        raise refused.__cause__ from None  # type: ignore[misc]
    except SystemExit as end:
        if not end.code:  # it was asked for help
            raise
    _, *lines = (line.strip("│| ") for line in box.getvalue().splitlines())  # below the title
    texts = (line if line.strip("─-") else "" for line in lines)  # without rules
    said = itertools.takewhile(bool, itertools.dropwhile(operator.not_, texts))
    told = " ".join(said).removeprefix("Error parsing ").rstrip(".")
    _, _, close = box.getvalue().partition("Perhaps you meant")
    flags = re.findall(r"^\W+(--[a-z][\w-]*)", close, re.MULTILINE)
    raise ConfigError(f"{told}." + f" Did you mean {' or '.join(flags)}?" * bool(flags))


def call(command: Callable[..., None], *, prog: str, args: list[str]) -> None:
    """Calls a function with what flags give, which are named as its arguments."""

    @functools.wraps(command)
    def later(*given: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(command, *given, **named)

    cli(later, prog=prog, args=args)()  # outside of tyro, for which all errors are those of flags


def parse(
    defaults: Any, args: list[str], *, names: Callable[[str], str], prog: str, description: str
) -> Any:
    """Reads flags into a dataclass of dataclasses.

    Args:
      defaults: an instance, whose values stay where no flag is given.
      args: the flags.
      names: from a field, by its name and that of the field which holds its dataclass, such as
        `client.learning_rate`, to the name of its flag.
      prog: the command's name.
      description: what it does.

    Returns:
      Another instance.

    Raises:
      ConfigError: there is no such flag, text cannot be read as a value, or what the dataclasses
        raise for values that cannot work.
    """
    registry = ConstructorRegistry()
    for rule in _RULES:
        registry.primitive_rule(rule)
    registry.struct_rule(functools.partial(_struct, _places(defaults), names))
    given = cli(
        type(defaults),
        default=defaults,
        args=args,
        prog=prog,
        description=description,
        registry=registry,
    )
    return _replaced(defaults, given, functools.partial(_flag, _places(defaults), names))


def _places(value: Any, place: str = "") -> dict[type, str]:
    """The dataclasses in one, itself included, by type, and the fields that hold them."""
    found = {type(value): place}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        found |= _places(inner, f"{field.name}.") if dataclasses.is_dataclass(inner) else {}
    return found


def _flag(places: Mapping[type, str], names: Callable[[str], str], kind: type, field: str) -> str:
    """The flag of a dataclass's field."""
    return "--" + names(places[kind] + field).replace("_", "-")


def _struct(
    places: Mapping[type, str], names: Callable[[str], str], info: StructTypeInfo
) -> StructConstructorSpec | None:
    """Tyro's rule for a dataclass: a flag for each field, and a heading for all of them.

    It makes a dictionary of them; the dataclass is made outside of tyro, which would print what it
    raises in a way of its own.
    """
    if info.type not in places:
        return None
    texts = _texts(info.type, functools.partial(_flag, places, names, info.type))
    hints, fields = typing.get_type_hints(info.type), []
    for field in dataclasses.fields(info.type):
        kind, value = _without_functions(hints[field.name]), getattr(info.default, field.name)
        if kind is None or not field.metadata.get("flag", True):
            continue
        title = field.name if type(value) in places else names(places[info.type] + field.name)
        hint = "(default: none)" if value == () else None
        arg = tyro.conf.arg(name=title, prefix_name=False, help_behavior_hint=hint)
        kind = Annotated[kind, arg]
        fields.append(StructFieldSpec(field.name, kind, value, texts.get(field.name)))  # type: ignore[arg-type]
    return StructConstructorSpec(dict, tuple(fields))


def _replaced(defaults: Any, given: Mapping[str, Any], flag: Callable[[type, str], str]) -> Any:
    """The dataclass with values in place of its own; dictionaries are for dataclasses in it.

    Errors tell which of the values that they name are those of a preset.
    """
    changes = {
        name: _replaced(getattr(defaults, name), value, flag) if isinstance(value, dict) else value
        for name, value in given.items()
    }
    try:
        return dataclasses.replace(defaults, **changes)
    except ConfigError as error:
        kept = [
            f" {flag(type(defaults), field.name)} {value!r} is the preset's."
            for field in dataclasses.fields(defaults)
            if re.search(rf"\b{field.name}\b", str(error))
            and field.default not in (value := getattr(defaults, field.name), dataclasses.MISSING)
            and changes.get(field.name, value) == value
        ]
        raise ConfigError("".join([str(error), *kept])) from error


# Kinds of values that no command line can give; of a path it gives the text.
_NOT_GIVEN = (collections.abc.Callable, collections.abc.Mapping, os.PathLike)


def _without_functions(kind: Any) -> Any:
    """A type without what cannot be given; None if nothing is left."""
    if typing.get_origin(kind) in _NOT_GIVEN:
        return None
    if typing.get_origin(kind) not in (Union, types.UnionType):
        return kind
    left = tuple(k for k in typing.get_args(kind) if _without_functions(k) is not None)
    return Union[left] if set(left) - {type(None)} else None  # noqa: UP007  (of a tuple)


def _texts(kind: type, flag: Callable[[str], str]) -> dict[str, str]:
    """The descriptions of a dataclass's fields, which call other fields by their flags."""
    own = {field.name for field in dataclasses.fields(kind)}

    def told(found: re.Match[str]) -> str:
        return f"`{flag(found[1])}`" if found[1] in own else found[0]

    return {name: re.sub(r"`(\w+)`", told, text) for name, text in _descriptions(kind).items()}


# Whose fields another dataclass has too, documented there.
_CHANGES: dict[type, type] = {NetworkConfig: ODENetConfig}


def _descriptions(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass, and of those that it inherits from, say of its fields."""
    found = _descriptions(_CHANGES[kind]) if kind in _CHANGES else {}
    for base in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        for entry in docstring_parser.parse(base.__doc__ or "").params:
            found[entry.arg_name] = " ".join((entry.description or "").split())
    return found
