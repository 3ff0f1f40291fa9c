"""Large-minibatch SGD whose result does not depend on how many processes ran it.

The pieces of a training loop of your own; `largebatch.run` puts the same ones together for the command line.
They are imported when they are first used, since importing torch takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from largebatch.config import Config
    from largebatch.config import read_config as load_config
    from largebatch.data.load import load as load_data
    from largebatch.distributed.environment import Ranks, connect
    from largebatch.models.build import build as build_model
    from largebatch.recipe.order import EpochOrder
    from largebatch.recipe.schedule import Schedule, ScheduleSettings, make_schedule
    from largebatch.training.evaluation import evaluate
    from largebatch.training.groups import parameter_groups
    from largebatch.training.optimizer import set_lr
    from largebatch.training.virtual_workers import VirtualWorkers

__version__ = "0.1.0"

__all__ = [
    "Config",
    "EpochOrder",
    "Ranks",
    "Schedule",
    "ScheduleSettings",
    "VirtualWorkers",
    "build_model",
    "connect",
    "evaluate",
    "load_config",
    "load_data",
    "make_schedule",
    "parameter_groups",
    "set_lr",
]

_HOMES = {
    "Config": "largebatch.config:Config",
    "EpochOrder": "largebatch.recipe.order:EpochOrder",
    "Ranks": "largebatch.distributed.environment:Ranks",
    "Schedule": "largebatch.recipe.schedule:Schedule",
    "ScheduleSettings": "largebatch.recipe.schedule:ScheduleSettings",
    "VirtualWorkers": "largebatch.training.virtual_workers:VirtualWorkers",
    "build_model": "largebatch.models.build:build",
    "connect": "largebatch.distributed.environment:connect",
    "evaluate": "largebatch.training.evaluation:evaluate",
    "load_config": "largebatch.config:read_config",
    "load_data": "largebatch.data.load:load",
    "make_schedule": "largebatch.recipe.schedule:make_schedule",
    "parameter_groups": "largebatch.training.groups:parameter_groups",
    "set_lr": "largebatch.training.optimizer:set_lr",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'largebatch' has no attribute {name!r}")
    module, attribute = _HOMES[name].split(":")
    return getattr(importlib.import_module(module), attribute)
