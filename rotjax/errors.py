"""Errors that a caller can cause: one line says what is wrong, where, and what to do; commands exit with `exit_code`."""

import operator
import os
from collections.abc import Iterable
from typing import Any

MOST = 5  # names in a line


def launcher() -> str:
    """The prefix of commands shown to the user: `uv run ` if this process was started by it."""
    return "uv run " if "UV" in os.environ else ""


def in_bytes(count: float) -> str:
    """`count` bytes in kB, MB or GB."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if count >= unit), (1e3, "kB"))
    return f"{count / unit:,.1f} {name}"


def reason(error: BaseException) -> str:
    """Why `error` was raised, in up to 100 characters: the system's words where it has some, else its first line,
    without its middle where that is longer.
    """
    said = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
    return said if len(said) <= 100 else f"{said[:38]} ... {said[-57:]}"  # the cause is at either end


def few(words: Iterable[str], most: int = MOST) -> str:
    """The first `most` of `words`, and how many more there are."""
    words = list(words)
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


class RotjaxError(Exception):
    """Base of the errors that a caller can cause."""

    exit_code = 1


class UsageError(RotjaxError, ValueError):
    """An argument is unknown, out of range or contradictory."""

    exit_code = 2


class DataError(RotjaxError):
    """Data is missing, unreadable or too small."""

    exit_code = 3


class ReadError(DataError):
    """A file cannot be read at present, for a reason that may pass."""


class CheckpointError(RotjaxError):
    """A file of a run, or of results, is missing, unusable or cannot be written."""

    exit_code = 4


class NonFiniteError(RotjaxError):
    """The loss or the variables are no longer finite."""

    exit_code = 5


class InUseError(RotjaxError):
    """Another process is using the workdir, or another file that one at a time may use."""

    exit_code = 6


class Stopped(RotjaxError):
    """A signal stopped the run after saving; the same command resumes (EX_TEMPFAIL)."""

    exit_code = 75


class FellowError(RotjaxError):
    """Another process of this run failed, with `exit_code`, and says why itself."""

    def __init__(self, exit_code: int):
        super().__init__("another process of this run has stopped, and says why")
        self.exit_code = exit_code


class DesertedError(RotjaxError):
    """Another process of this run has died; the same command, in all of them, resumes from the last checkpoint."""

    exit_code = 75


def check_integer(name: str, value: Any) -> None:
    """Raises UsageError unless `value`, of the argument `name`, is an integer of any kind."""
    try:
        operator.index(value)
    except TypeError:
        raise UsageError(f"{name}={value!r} is no integer; give one") from None
