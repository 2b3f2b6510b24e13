"""What a caller can cause: one line that says what is wrong, where, and what to do; commands exit with `exit_code`."""

import os


def launcher() -> str:
    """What stands before `python` in a command that the user is told to type: `uv run ` where uv runs this one."""
    return "uv run " if "UV" in os.environ else ""


def in_bytes(count: float) -> str:
    """`count` bytes in the unit in which they are one to three digits."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if count >= unit), (1e3, "kB"))
    return f"{count / unit:,.1f} {name}"


def reason(error: BaseException) -> str:
    """Why `error` was raised, in up to 100 characters: the system's words where it has some, else its first line."""
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return said.splitlines()[0][:100]


class RotjaxError(Exception):
    """What a caller can cause."""

    exit_code = 1


class UsageError(RotjaxError, ValueError):
    """Something is named wrongly, out of range, or contradicts."""

    exit_code = 2


class DataError(RotjaxError):
    """Data is not there, not readable, or too small."""

    exit_code = 3


class CheckpointError(RotjaxError):
    """A checkpoint is missing, unusable or cannot be written."""

    exit_code = 4


class NonFiniteError(RotjaxError):
    """The loss is no longer a number."""

    exit_code = 5


class InUseError(RotjaxError):
    """Another process is at work in the workdir."""

    exit_code = 6


class Stopped(RotjaxError):
    """A signal stopped the run after it had saved; the same command continues (EX_TEMPFAIL)."""

    exit_code = 75


class FellowError(RotjaxError):
    """Another process of this run failed, with `exit_code`, and says why itself."""

    def __init__(self, exit_code: int):
        super().__init__("another process of this run has stopped, and says why")
        self.exit_code = exit_code


class DesertedError(RotjaxError):
    """Another process of this run is gone; the same command, in all of them, continues from the last checkpoint."""

    exit_code = 75
