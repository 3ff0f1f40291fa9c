"""A user's own object by import path."""

from __future__ import annotations

import importlib
import re
from typing import Any

from largebatch.wording import config_error, did_you_mean, reason

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def check_import_path(path: str) -> str:
    """`path`; raises ValueError unless it has the form of an import path."""
    if not _PATH.fullmatch(path):
        raise ValueError(f"{path!r} is not of the form package.module:function")
    return path


def import_object(path: str, key: str) -> Any:
    """The object at the import path ``package.module:name``, which the config key ``key`` gives.

    Raises ConfigError, with the reason, where the module cannot be imported or has no such name.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise config_error(key, f"{path!r} cannot be imported", reason(error)) from error
    if not hasattr(module, name):
        raise config_error(key, f"{path!r}: {module_name} has no {name!r}{did_you_mean(name, vars(module))}")
    return getattr(module, name)
