"""Arguments that several commands have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def folder_name(text: str) -> Path:
    """The folder given to an option; an unset shell variable must not mean the current folder."""
    if not text:
        raise typer.BadParameter("'' is not a folder; give one ('.' for the current one)")
    return Path(os.path.expanduser(text))


ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file, or a name of `config list`.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value]...", help="Values that replace the config's.", show_default=False),
]
