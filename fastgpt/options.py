"""Command-line options from a dataclass: the field `val_share` is the option `--val-share`."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from dataclasses import field, fields
from numbers import Integral, Real
from typing import Any, get_args, get_origin, get_type_hints

from fastgpt.json_io import shown

TEXT_KEY = "key or column of the text in JSON, CSV and Parquet files; a.b for a key in another"


def option(
    default: Any,
    text: str,
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    described: str = "",
    synonyms: dict[str, str] | None = None,
) -> Any:
    """Define a field of such a dataclass.

    Args:
        default: the default value.
        text: the help text.
        choices: the allowed values; empty for any.
        aliases: other names of the option.
        described: the default value in words, if None stands for another one.
        synonyms: other names of values.
    """
    metadata = {"help": text, "choices": choices, "aliases": aliases, "described": described}
    return field(default=default, metadata=metadata | {"synonyms": synonyms or {}})


def add_options(
    parser: argparse.ArgumentParser,
    options: type,
    groups: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add an option for each field of a dataclass of `option`s.

    The parsed namespace contains only the options that were given.

    Args:
        parser: the parser.
        options: the dataclass.
        groups: titles of groups in the help, by the first field of each.
        defaults: default values that the help shows instead of those of the fields.
    """
    hints = get_type_hints(options)
    group: Any = parser
    for item in fields(options):
        if groups and item.name in groups:
            group = parser.add_argument_group(groups[item.name])
        kind = kind_of(hints[item.name])
        own = (defaults or {}).get(item.name)
        default = own or item.metadata["described"] or ("none" if item.default is None else item.default)
        settings: dict[str, Any] = {
            "dest": item.name,
            "default": argparse.SUPPRESS,
            "help": f"{item.metadata['help']} (default: {default})".replace("%", "%%"),
        }
        if get_origin(kind) is tuple:
            settings |= {"type": _numbers, "metavar": "N[,N...]"}
        elif kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            synonyms = item.metadata["synonyms"]
            settings["type"] = functools.partial(_synonym, synonyms) if synonyms else kind
            settings["choices"] = item.metadata["choices"] or None
            settings["metavar"] = None if item.metadata["choices"] else kind.__name__.upper()
        group.add_argument("--" + item.name.replace("_", "-"), *item.metadata["aliases"], **settings)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of whole numbers, such as 256 or 256,256,0"
        ) from None


def _synonym(synonyms: Mapping[str, str], value: str) -> str:
    return synonyms.get(value, value)


def kind_of(hint: Any) -> type:
    """Return the type of a field's value without None: X for both X and X | None."""
    kind: type = next((part for part in get_args(hint) if part is not type(None)), hint)
    return kind


_NUMBERS: dict[type, type] = {int: Integral, float: Real}


def check_types(options: Any) -> None:
    """Raise ValueError unless every field of a dataclass has a value of its type.

    The types are int, float, bool and str, and unions of one with None. A tuple may be in the union; its fields are
    checked by their owner.
    """
    for name, hint in get_type_hints(type(options)).items():
        value, kind = getattr(options, name), kind_of(hint)
        if isinstance(value, tuple) and any(get_origin(part) is tuple for part in get_args(hint)):
            continue
        if value is None and type(None) in get_args(hint):
            continue
        if not isinstance(value, _NUMBERS.get(kind, kind)) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} must be of type {kind.__name__}, not {shown(value)}")


def check_sizes(options: Any, largest: dict[str, int]) -> None:
    """Raise ValueError unless every field is between 1 and its largest value."""
    for name, most in largest.items():
        value = getattr(options, name)
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be at least 1 and at most {most:,}, not {shown(value)}")
