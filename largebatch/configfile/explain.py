"""pydantic's validation errors in our words: where the value came from, its path, the rule, a better name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from largebatch.section import Section
from largebatch.wording import did_you_mean, printable, show

COMMAND_LINE = "command line"
Steps = tuple[str | int, ...]


class Layer(NamedTuple):
    """What one file of an ``extends`` chain, or the command line, sets."""

    source: str
    values: dict[str, Any]


# What a value must be, to be read after "is not".
_RULES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "text (a path)",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "dataclass_type": "a mapping of keys",
    "none_required": "null",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "of {min_length} or more items",
    "too_long": "of {max_length} or fewer items",
    "string_too_short": "of {min_length} or more characters",
    "string_too_long": "of {max_length} or fewer characters",
    "string_pattern_mismatch": "of the form {pattern}",
    "union_tag_invalid": "a mapping whose {discriminator} is one of {expected_tags}",
    "union_tag_not_found": "a mapping with the key {discriminator}",
}


def explain(
    error: ValidationError, file: str, layers: Sequence[Layer], merged: dict[str, Any], root: type[Section]
) -> str:
    """One line for each place of the config that is wrong, however many branches of a union say so."""
    problems: dict[Steps, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        problems.setdefault(_place(detail, merged), []).append(detail)
    lines = []
    for place, details in problems.items():
        # A union complains about the whole value too; the complaint about a part of it says more.
        if not any(place != other and place == other[: len(place)] for other in problems):
            source = _source(place, layers) or file
            path = place
            if source == COMMAND_LINE and details[0]["type"] == "extra_forbidden":
                path = _as_written(place, layers[-1].values)
            parts = [source, ".".join(map(str, path)), _problem(place, details, root)]
            lines.append(printable(": ".join(part for part in parts if part)))
    return "\n".join(lines)


def _place(detail: ErrorDetails, values: Any) -> Steps:
    """The path of an error in the config's values: pydantic's, without its names for a union's branches."""
    place: list[str | int] = []
    for step in detail["loc"]:
        if _has(values, step):
            values = values[step]
            place.append(step)
    if detail["type"] == "missing":
        place.append(detail["loc"][-1])
    return tuple(place)


def _has(values: Any, step: str | int) -> bool:
    if isinstance(values, list):
        return isinstance(step, int) and step < len(values)
    return isinstance(values, dict) and step in values


def _source(place: Steps, layers: Sequence[Layer]) -> str | None:
    """The last layer that sets the value at this place, or else the nearest mapping or list around it."""
    for length in range(len(place), 0, -1):
        for layer in reversed(layers):
            if _holds(layer.values, place[:length]):
                return layer.source
    return None


def _holds(values: Any, place: Steps) -> bool:
    for step in place:
        if not _has(values, step):
            return False
        values = values[step]
    return True


def _as_written(place: Steps, values: Any) -> Steps:
    """The path as an override spells it: pydantic stops at an unknown section, the user named a key in it."""
    for step in place:
        values = values[step] if _has(values, step) else None
    while isinstance(values, dict) and len(values) == 1:
        [(step, values)] = values.items()
        place = (*place, step)
    return place


def _problem(place: Steps, details: list[ErrorDetails], root: type[Section]) -> str:
    """What is wrong with the value at ``place``; several details are the branches of one union."""
    for detail in details:
        kind, context = detail["type"], detail.get("ctx", {})
        if kind == "missing":
            return "missing; it has no default"
        if kind == "extra_forbidden":
            return f"no such key{_key_advice(place, root)}"
        if kind in ("value_error", "assertion_error"):
            return " ".join(str(context["error"]).split())
        if kind not in _RULES and kind != "literal_error":
            return f"{show(detail['input'])}: {detail['msg']}"
    rules = [_rule(detail) for detail in details]
    if _may_be_null(place, root):
        rules.append("null")
    seen = details[0]["input"]
    choices = [choice for detail in details for choice in _choices(detail)]
    hint = did_you_mean(seen, choices) if isinstance(seen, str) else ""
    if details[0]["type"] == "string_type" and isinstance(seen, bool | int | float):
        hint = f'; put it in quotes: \'"{seen}"\' on a command line, "{seen}" in a file'
    return f"{show(seen)} is not {' or '.join(dict.fromkeys(rules))}{hint}"


def _rule(detail: ErrorDetails) -> str:
    context = {key: f"{x:g}" if isinstance(x, float) else x for key, x in detail.get("ctx", {}).items()}
    if detail["type"] != "literal_error":
        return _RULES[detail["type"]].format(**context)
    expected = str(context["expected"]).replace(" or ", ", ")
    return f"one of {expected}" if ", " in expected else expected


def _choices(detail: ErrorDetails) -> list[str]:
    expected = str(detail.get("ctx", {}).get("expected", ""))
    return re.findall(r"'([^']*)'", expected)


def _key_advice(place: Steps, root: type[Section]) -> str:
    """The nearest key beside an unknown one, or the same key in another section, or the keys there are."""
    key = str(place[-1])
    beside = [name for model in _models_at(place[:-1], root) for name in model.model_fields]
    elsewhere = [path for path in _all_paths(root) if path.rpartition(".")[2] == key]
    if near := did_you_mean(key, beside):
        return near
    return f"; did you mean {elsewhere[0]!r}?" if elsewhere else f"; the keys here are {', '.join(beside)}"


def _may_be_null(place: Steps, root: type[Section]) -> bool:
    name = str(place[-1]) if place else ""
    fields = [model.model_fields.get(name) for model in _models_at(place[:-1], root)]
    return any(field is not None and NoneType in get_args(field.annotation) for field in fields)


def _models_at(place: Steps, root: type[Section]) -> list[type[BaseModel]]:
    """The sections that a mapping at this place may be."""
    models: list[type[BaseModel]] = [root]
    for step in place:
        if isinstance(step, str):
            fields = [model.model_fields[step] for model in models if step in model.model_fields]
            models = [model for field in fields for model in _models_in(field.annotation)]
    return models


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _all_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from _all_paths(inner, f"{prefix}{name}.")
