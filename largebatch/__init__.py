"""Large-minibatch SGD whose result does not depend on how many processes ran it.

The pieces of a training loop of your own; `largebatch.run` puts the same ones together for the command line.
They are imported when they are first used, since importing torch takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from largebatch.distributed.environment import Ranks, connect
    from largebatch.recipe.order import EpochOrder
    from largebatch.recipe.schedule import Schedule, ScheduleSettings, make_schedule
    from largebatch.training.evaluation import evaluate
    from largebatch.training.optimizer import parameter_groups, set_lr
    from largebatch.training.virtual_workers import VirtualWorkers

__version__ = "0.1.0"

_HOMES = {
    "EpochOrder": "largebatch.recipe.order",
    "Ranks": "largebatch.distributed.environment",
    "Schedule": "largebatch.recipe.schedule",
    "ScheduleSettings": "largebatch.recipe.schedule",
    "VirtualWorkers": "largebatch.training.virtual_workers",
    "connect": "largebatch.distributed.environment",
    "evaluate": "largebatch.training.evaluation",
    "make_schedule": "largebatch.recipe.schedule",
    "parameter_groups": "largebatch.training.optimizer",
    "set_lr": "largebatch.training.optimizer",
}

__all__ = [
    "EpochOrder",
    "Ranks",
    "Schedule",
    "ScheduleSettings",
    "VirtualWorkers",
    "connect",
    "evaluate",
    "make_schedule",
    "parameter_groups",
    "set_lr",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'largebatch' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
