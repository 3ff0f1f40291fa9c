"""Errors that the user can fix, and the exit status of each."""

from __future__ import annotations

EXIT_OK = 0
EXIT_USER_INPUT = 2
EXIT_HEALTH = 3
EXIT_PREEMPTED = 75


class UserError(Exception):
    """The user's input is wrong: the message states the value, the rule and the remedy. Exit status 2."""

    exit_status = EXIT_USER_INPUT


class ConfigError(UserError):
    """A config file or an override is wrong; the message names the config path (``section.key``)."""


class DataError(UserError):
    """A data set is missing or damaged; the message names the file and the remedy."""


class HealthError(Exception):
    """Training is unhealthy (a loss that is not finite, replicas that differ). Exit status 3."""

    exit_status = EXIT_HEALTH


class CheckpointError(UserError):
    """A checkpoint cannot be written (disk full, read-only); the ones before it are intact. Exit status 2."""


class Preempted(Exception):
    """Stopped by a signal; a checkpoint is written. Exit status 75: the same command resumes."""

    exit_status = EXIT_PREEMPTED


class RanksLost(Exception):
    """Other ranks are lost or do not answer; the message names them. Exit status 1."""

    exit_status = 1
