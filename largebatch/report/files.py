"""Files that hold either their old or their new content, complete, whenever the process or machine stops."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: no reader, and no crash, ever meets a half-written file.

    The temporary file lies in the same folder, because a rename is atomic only within one file system.
    Raises OSError when the folder is missing or cannot be written.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it private; a run folder is shared
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8, atomically. Raises OSError like `write_bytes_atomically`.

    Names of files may hold bytes that are not UTF-8; they are written as JSON escapes them.
    """
    write_bytes_atomically(path, text.encode(errors="backslashreplace"))


def write_json_atomically(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON with sorted keys and a closing newline, atomically.

    Raises TypeError for what JSON has no form for and ValueError for NaN and infinity.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text_atomically(path, text + "\n")


def _umask() -> int:
    """The process's umask; the operating system reveals it only when it is set."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
