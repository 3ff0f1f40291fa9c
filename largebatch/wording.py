"""How messages for users are worded: on one line, with the value and the closest valid name."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from largebatch.errors import ConfigError

_YAML_WORDS = {None: "null", True: "true", False: "false"}


def config_error(*parts: str) -> ConfigError:
    """The error whose message is the parts (source, path, problem) that are not empty, on one line."""
    return ConfigError(printable(": ".join(part for part in parts if part)))


def printable(text: str) -> str:
    """The text with every control character escaped, so that it is one line on any terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def show(value: Any) -> str:
    """A value in at most 80 characters, spelled as in YAML where that differs from Python."""
    text = _YAML_WORDS[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def did_you_mean(seen: str, names: Iterable[str]) -> str:
    """``; did you mean 'NAME'?`` with the nearest of the names, or nothing where none is near."""
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(seen.lower(), list(by_lower), n=1)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def reason(error: BaseException) -> str:
    """An exception of a user's own code on one line: type, message, and the file and line that raised it."""
    called = traceback.extract_tb(error.__traceback__)[1:]
    origins = [frame for frame in called if not frame.filename.startswith("<frozen importlib")]
    place = f" ({origins[-1].filename}:{origins[-1].lineno})" if origins else ""
    return f"{type(error).__name__}: {error}{place}"
