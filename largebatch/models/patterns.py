"""Parts of a model by patterns of their names, as `model.freeze` and `optimizer.no_decay` give them."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from largebatch.wording import config_error, did_you_mean


def match(model: nn.Module, pattern: str, key: str) -> tuple[list[str], set[str]]:
    """The names of the modules that match `pattern`, and of the parameters that match or lie below such a module.

    Raises ConfigError, which names the config `key`, if there are none of either.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = [name for name, _ in model.named_modules() if name and fnmatchcase(name, pattern)]
    matched = {name for name in parameters if fnmatchcase(name, pattern) or is_below(name, modules)}
    if not matched and not modules:
        near = did_you_mean(pattern, [*parameters, *dict(model.named_modules())])
        raise config_error(key, f"{pattern!r} matches no parameter or module of the model{near}")
    return modules, matched


def is_below(name: str, modules: list[str]) -> bool:
    """Whether a parameter or module of this name is a part of one of `modules`."""
    return any(name.startswith(f"{module}.") for module in modules)
