"""A lock file that names the process holding it."""

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from rotjax.errors import InUseError

log = logging.getLogger(__name__)

LOCKLESS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what flock says on Lustre, or NFS, that was mounted without


@contextmanager
def locked(path: Path, what: str, *, wait: bool = False) -> Iterator[Callable[[], bool]]:
    """Holds the lock file `path` for `what`, and tells whether it still does; where another process does, waits or raises
    InUseError.

    A process that died holds nothing; one whose `path` was moved away no longer does. Raises OSError where `path` cannot be
    written.
    """
    patience = time.monotonic() + 1
    while True:
        with open(path, "a+", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not _is_locked(file) and time.monotonic() < patience:
                    time.sleep(0.01)
                    continue  # `taken` was looking
                file.seek(0)
                holder = file.read().strip() or "another process"
                busy = f"{what} is in use by {holder}"
                if not wait:
                    remedy = "close what it has begun there" if holder == _own_name() else "wait for it"
                    raise InUseError(f"{busy}; {remedy}") from None
                log.info(f"{busy}; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in LOCKLESS:
                    raise
                log.warning(f"there are no locks on the disk of {path.parent}; see to it that nothing else uses {what}")
                file.truncate(0)
            if not leads_to(path, file.fileno()):
                continue  # whoever held it was done and has removed it
            file.seek(0)
            if died := file.read().strip():
                log.info(f"taking {what} over from {died}, which died")
            name = _own_name()
            try:
                file.truncate(0)
                print(name, file=file, flush=True)
                yield lambda: leads_to(path, file.fileno())
            finally:
                with suppress(OSError):
                    if leads_to(path, file.fileno()) and name == _own_name():  # else it is another's, or this is a fork
                        path.unlink()
            return


def _own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def taken(path: Path) -> bool:
    """Whether a process holds the lock file `path`."""
    try:
        with open(path) as file:
            return _is_locked(file)
    except OSError:
        return False


def _is_locked(file: IO) -> bool:
    """Whether another than `file` has its lock, but to look, as this does."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def leads_to(path: Path, descriptor: int) -> bool:
    """Whether `path` leads to the file that is open as `descriptor`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False
