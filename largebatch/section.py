"""The base class of every component's own config section.

Strict (a string is not a number), closed (an unknown key is an error) and frozen (a run never changes its
config). Free of torch, so that reading a config stays quick.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A typed config section; subclass it beside the component that reads it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)
