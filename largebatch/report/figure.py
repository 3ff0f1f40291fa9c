"""Every plot of the package is made here: one size of text, one way to a file, and never a reason to lose a run."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from largebatch.report.files import write_bytes_atomically

# Names come from users: "lr_$_$0.1" is a name, not a formula, whatever the user's matplotlibrc says.
_TEXT_IS_TEXT: Any = {"text.parse_math": False, "text.usetex": False}
Warn = Callable[[str], None]


def draw(path: Path, make: Callable[[], Any], warn: Warn) -> bool:
    """Write the figure that `make` returns to `path`, atomically; False, after a warning, where that fails.

    A plot can be drawn again from the numbers; what the numbers cost cannot be had again. So whatever goes wrong here
    (a broken matplotlib, a name that it cannot show, a folder in the way) ends nothing.
    """
    try:
        import matplotlib  # slow to import

        with matplotlib.rc_context(_TEXT_IS_TEXT):
            figure = make()
            image = io.BytesIO()
            figure.savefig(image, format="png")
        write_bytes_atomically(path, image.getvalue())
    except Exception as error:
        warn(f"{path.name} could not be drawn ({type(error).__name__}: {error})")
        return False
    return True


def panels(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **kinds: Any) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row; `size` is that of one panel in inches."""
    # A Figure of its own leaves a user's pyplot and its backend alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kinds).flatten().tolist()
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    return figure, axes


def explain(figure: Any, title: str, caption: str) -> None:
    """What the figure is about, above it, and what its marks mean, below it."""
    figure.suptitle(plain(title), fontsize="medium")
    figure.supxlabel(plain(caption), fontsize="small", color="#555555")


def plain(text: str) -> str:
    """`text` as matplotlib shows it: no bytes that are not UTF-8, and no leading "_", which hides a legend's entry."""
    shown = text.encode("utf-8", "backslashreplace").decode()
    return f" {shown}" if shown.startswith("_") else shown
