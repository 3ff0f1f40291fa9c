"""The base class of every component's own config section.

Strict (a string is not a number), closed (an unknown key is an error) and frozen (a run never changes its
config). Free of torch, so that reading a config stays fast.
"""

from __future__ import annotations

import os
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict

T = TypeVar("T")

FREE_ON_RESUME = "may differ when a run is resumed"
FreeOnResume = Annotated[T, FREE_ON_RESUME]
"""A field that changes no number, or only says how to resume."""


def expanded(path: str) -> str:
    """The path with ``~`` and ``$NAME`` replaced; a variable that is not set stays as it is, to be seen in messages."""
    return os.path.expanduser(os.path.expandvars(path))


FolderName = Annotated[str, AfterValidator(expanded)]


class Section(BaseModel):
    """A typed config section; subclass it next to the component that reads it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)
