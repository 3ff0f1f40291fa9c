"""`model.freeze`: parts of a model that are not trained."""

from __future__ import annotations

from torch import nn

from largebatch.models.normalisation import batchnorm_modules, keep_in_evaluation
from largebatch.models.patterns import is_below, match
from largebatch.wording import config_error


def freeze(model: nn.Module, patterns: list[str]) -> int:
    """Freeze the parameters and modules whose names match one of `patterns`; returns how many parameters those are.

    A module's name stands for all that is below it. BatchNorm of a frozen part stays in evaluation mode for good.
    Raises ConfigError for a pattern without a match, or if nothing is left to train.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen: set[str] = set()
    for pattern in patterns:
        parts, matched = match(model, pattern, "model.freeze")
        frozen |= matched
        for name, module in batchnorm_modules(model):
            if name in parts or is_below(name, parts):
                keep_in_evaluation(module)
    for name in frozen:
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise config_error("model.freeze", f"{patterns} leaves no parameter to train; leave out a pattern")
    for name, module in batchnorm_modules(model):
        own = {f"{name}.{part}" for part, _ in module.named_parameters(recurse=False)}
        if own and own <= frozen:
            keep_in_evaluation(module)
    return len(frozen)
