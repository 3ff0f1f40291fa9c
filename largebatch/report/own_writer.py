"""The user's own metrics writers, in addition to metrics.jsonl and TensorBoard (`logging.writers`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from largebatch.importing import import_object
from largebatch.wording import config_error, reason

_log = logging.getLogger(__name__)
_KEY = "logging.writers"


class OwnWriter:
    """What `module:function` returns for (run_dir, config): an object with `write(record)` and `close()`.

    Raises ConfigError if it cannot be made. Later errors are only logged: a tracking service that is down is no reason
    to lose a run.
    """

    def __init__(self, path: str, run_dir: Path, config: dict[str, Any]) -> None:
        self._path = path
        make = import_object(path, _KEY)
        try:
            made = make(run_dir, config)
        except (Exception, SystemExit) as error:
            raise config_error(_KEY, f"{path!r} failed when called with (run_dir, config)", reason(error)) from error
        if not all(callable(getattr(made, name, None)) for name in ("write", "close")):
            raise config_error(_KEY, f"{path!r} returned a {type(made).__name__} without write(record) and close()")
        self._made: Any = made

    def write(self, record: dict[str, Any]) -> None:
        """Hand over a copy of a record (see `largebatch.report.metrics`)."""
        self._call("write", dict(record))

    def close(self) -> None:
        """There are no more records."""
        self._call("close")

    def _call(self, name: str, *arguments: Any) -> None:
        if self._made is None:
            return
        try:
            getattr(self._made, name)(*arguments)
        except Exception as error:
            self._made = None
            _log.warning("warning: %s: %s: %s; it gets no more records", _KEY, self._path, reason(error))
