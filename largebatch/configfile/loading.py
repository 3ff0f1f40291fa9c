"""Reads a YAML config with ``extends:`` and command-line overrides into a root Section, and writes it back.

Invalid input raises a ConfigError with one line per problem: where the value came from, its dotted path, the
value, the rule, and the closest valid name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from largebatch.configfile.explain import COMMAND_LINE, Layer, explain
from largebatch.configfile.shipped import find_config, shipped_configs
from largebatch.configfile.yamlcore import MAX_DEPTH, read_plain, read_yaml, write_yaml
from largebatch.errors import ConfigError
from largebatch.section import Section, expanded
from largebatch.wording import config_error, did_you_mean, show

T = TypeVar("T", bound=Section)

MAX_BYTES = 1 << 20


def load_config(path: Path, overrides: Sequence[str], root: type[T]) -> T:
    """The config that the file at ``path`` and the overrides (``section.key=value``, a YAML value) describe.

    ``path`` may also be the name of a shipped config. The files named by ``extends:`` come first, then the file, then
    the overrides; mappings merge key by key, lists and single values replace. Raises ConfigError, one line a problem.
    """
    layers = [*_file_layers(path), _command_line_layer(overrides)]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer.values)
    try:
        # As JSON, because YAML has JSON's types: pydantic's strict mode then takes a list for a tuple.
        return root.model_validate_json(json.dumps(_with_whole_numbers(merged)))
    except ValidationError as error:
        raise ConfigError(explain(error, str(path), layers, merged, root)) from None


def dump_config(config: Section) -> str:
    """The whole config as YAML, in the order of its fields; ``load_config`` reads an equal config from it."""
    return write_yaml(config.model_dump(mode="json"))


def digest(config: Section) -> str:
    """SHA-256 (hex) of the config's values; the order in which they were written does not matter."""
    data = _canonical(config.model_dump(mode="json"))
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    """The value with 5.0 as 5: the two are equal, and a default may be written either way."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _file_layers(path: Path) -> list[Layer]:
    """The file and what it extends, the base first."""
    layers: list[Layer] = []
    chain: dict[str, Path] = {}  # real path -> the name it was reached by
    named_by = ""
    path = find_config(path)
    while True:
        values = _mapping_in(path, named_by)
        real = os.path.realpath(path)
        if real in chain:
            circle = " -> ".join(map(str, [*chain.values(), path]))
            raise config_error(named_by, f"the files extend each other in a circle: {circle}")
        chain[real] = path
        layers.insert(0, Layer(str(path), values))
        if "extends" not in values:
            return layers
        base = values.pop("extends")
        if not isinstance(base, str) or not base:
            raise config_error(str(path), "extends", f"{show(base)} is not the name of a file")
        named_by, path = f"{path}: extends", find_config(expanded(base), path.parent)


def _mapping_in(path: Path, named_by: str) -> dict[str, Any]:
    """The mapping in one file."""
    content = _read(path, named_by)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte 0x{content[error.start]:02x} at offset {error.start})"
        raise config_error(str(path), problem) from None
    values = read_yaml(text, str(path), if_empty="is empty; write the sections of a config")
    if not isinstance(values, dict):
        raise config_error(str(path), f"{show(values)} is not a mapping of sections (lines of `section:`)")
    return values


def _read(path: Path, named_by: str) -> bytes:
    """A file's content; ``named_by`` says who names the file, for the message where it cannot be read."""
    try:
        with open(path, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise config_error(named_by, str(path), f"no such file{_nearest_file(path)}") from None
    except IsADirectoryError:
        raise config_error(named_by, str(path), "is a folder; name a YAML file") from None
    except OSError as error:
        raise config_error(named_by, str(path), f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise config_error(named_by, str(path), "a null byte is not allowed in a name") from None
    if len(content) > MAX_BYTES:
        raise config_error(named_by, str(path), f"is larger than {MAX_BYTES} bytes; a config is a small file")
    return content


def _nearest_file(path: Path) -> str:
    shipped = did_you_mean(str(path), shipped_configs()) if not path.suffix else ""
    try:
        return did_you_mean(path.name, sorted(os.listdir(path.parent))) or shipped
    except OSError:
        return shipped or f"; there is no folder {str(path.parent)!r}"


def _command_line_layer(overrides: Sequence[str]) -> Layer:
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        steps = key.strip().split(".")
        if not equals or not all(steps) or len(steps) > MAX_DEPTH:
            raise config_error(COMMAND_LINE, f"{show(override)} is not of the form section.key=value")
        where = f"{COMMAND_LINE}: {key.strip()}"
        value = _override_value(text.strip(), where)
        for step in reversed(steps):
            value = {step: value}
        values = _merge(values, value)
    return Layer(COMMAND_LINE, values)


def _override_value(text: str, where: str) -> Any:
    """YAML where it is meant: text that opens no mapping, list, quotes or the like is one word, `#` and all."""
    if not text or text[0] in "{[\"'&*!" or "\n" in text:
        return read_yaml(text, where, if_empty="no value after '='; write null for none")
    return read_plain(text, where)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        # An empty mapping clears; otherwise nothing could take a key away.
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) and value else value
    return merged


def _with_whole_numbers(values: Any) -> Any:
    """1000.0 and 1e3 as 1000: a field of fractions takes either, one of whole numbers only this. What goes to a user's
    own function (`arguments`) stays as it was written."""
    if isinstance(values, dict):
        return {key: item if key == "arguments" else _with_whole_numbers(item) for key, item in values.items()}
    if isinstance(values, list):
        return [_with_whole_numbers(item) for item in values]
    whole = isinstance(values, float) and values.is_integer() and str(values) != "-0.0"  # which no whole number is
    return int(values) if whole else values
