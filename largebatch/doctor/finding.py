"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, what was seen, and, unless it is well, what to do."""

    subject: str
    level: Level
    seen: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ``doctor --json``."""
        return asdict(self)

    def line(self) -> str:
        """The same for people."""
        return f"{self.level:<8} {self.subject:<16} {self.seen}" + (f"; {self.remedy}" if self.remedy else "")


def judged(subject: str, seen: str, problem: str = "", *, level: Level = "warning") -> Finding:
    """``ok`` if there is no `problem` (a remedy), else of `level`."""
    return Finding(subject, level if problem else "ok", seen, problem)


def size(count: float) -> str:
    """Bytes for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
