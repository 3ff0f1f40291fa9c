"""YAML text to plain values and back, by the core schema of YAML 1.2 (section 10.3.2).

``1e-4`` is a number, ``no`` is a word, a key is always text and appears once; numbers are finite. What could
run code, or grow beyond the file's own size, is refused: tags, aliases, deep nesting.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from largebatch.wording import config_error

MAX_DEPTH = 50
MAX_DIGITS = 100


def read_yaml(text: str, where: str, if_empty: str) -> Any:
    """The value of one YAML document.

    Raises ConfigError, opening with ``where``: the line, the column and what is wrong, or ``if_empty``.
    """
    line, column = 0, 0
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            return loader.construct_document(node)
        problem = if_empty
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        if error.problem_mark is not None:
            line, column = error.problem_mark.line + 1, error.problem_mark.column + 1
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        problem = f"the character U+{ord(text[error.position]):04X} is not allowed"
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    except (ValueError, OverflowError) as error:  # PyYAML's own conversions, as of "\UFFFFFFFF"
        problem = f"not valid YAML: {error}"
    raise config_error(where, f"line {line}, column {column}" if line else "", problem)


def read_plain(text: str, where: str) -> Any:
    """The value of `text` as one plain scalar, of which ``#`` and ``: `` are parts; raises ConfigError."""
    loader = _Loader("")
    try:
        return loader.construct_document(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))
    except yaml.MarkedYAMLError as error:
        raise config_error(where, str(error.problem)) from None


def write_yaml(data: Any) -> str:
    """YAML text from which ``read_yaml`` reads the same value; mappings keep their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100)


class _Loader(yaml.SafeLoader):
    """SafeLoader without what could run code, or grow beyond the file's own size, and with text for keys."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _error_at(event, "aliases (*name) are not allowed; repeat the value, or use extends")
        if event.tag is not None:
            raise _error_at(event, f"tags ({event.tag}) are not allowed")
        if self.depth == MAX_DEPTH:
            raise _error_at(event, f"nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Keys are always text (``1:`` is the key '1'), since a dotted path must be able to name them."""
        values: dict[Any, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _error_at(key_node, "a key must be a plain word")
            key = self.text(key_node)
            if key in values:
                raise _error_at(key_node, f"the key {key!r} appears a second time (first on line {lines[key]})")
            lines[key] = key_node.start_mark.line + 1
            values[key] = self.construct_object(value_node, deep=deep)
        return values

    def text(self, node: yaml.ScalarNode) -> str:
        try:  # JSON, which YAML includes, escapes a character beyond U+FFFF as two surrogates
            return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise _error_at(node, "half of a surrogate pair is not a character") from None

    def integer(self, node: yaml.ScalarNode) -> int:
        text = node.value
        if len(text) > MAX_DIGITS:
            raise _error_at(node, f"a number of {len(text)} digits is too long")
        base = {"0x": 16, "0o": 8}.get(text[:2], 10)
        return int(text if base == 10 else text[2:], base)

    def fraction(self, node: yaml.ScalarNode) -> float:
        number = self.construct_yaml_float(node)
        if not math.isfinite(number):
            raise _error_at(node, f"{node.value} is not a finite number")
        return number


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else; short lists go on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    one_line = not any(isinstance(item, list | dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=one_line)


_Dumper.add_representer(list, _represent_list)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.fraction)

_Loader.yaml_implicit_resolvers = {}  # those of YAML 1.1
# The scalars of YAML 1.2's core schema (its section 10.3.2), so that 1e-4 is a number and `no` is a word.
for _tag, _pattern, _first in [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
]:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _error_at(thing: yaml.Event | yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    mark = thing.start_mark
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark if isinstance(mark, yaml.Mark) else None)
