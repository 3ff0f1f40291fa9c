"""What may go wrong in a way that the user can mend, and the exit status of each."""

from __future__ import annotations

EXIT_OK = 0
EXIT_USER_INPUT = 2
EXIT_HEALTH = 3


class UserError(Exception):
    """The user's input is wrong: the message says what was seen, the rule, and the remedy. Exit status 2."""

    exit_status = EXIT_USER_INPUT


class ConfigError(UserError):
    """A config file or an override is wrong; the message names the config path (``section.key``)."""


class DataError(UserError):
    """A data set is missing or damaged; the message names the file and the remedy."""


class HealthError(Exception):
    """Training is not healthy (a loss that is not finite). Exit status 3."""

    exit_status = EXIT_HEALTH
