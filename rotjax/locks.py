"""One process at a time: a lock file that says which."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rotjax.errors import InUseError

log = logging.getLogger(__name__)


@contextmanager
def held(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock file `path` for `what`; where another process does, waits or raises InUseError.

    A process that died holds nothing. Raises OSError where `path` cannot be written.
    """
    while True:
        with open(path, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                busy = f"{what} is in use by {file.read().strip() or 'another process'}"
                if not wait:
                    raise InUseError(f"{busy}; wait for it") from None
                log.info(f"{busy}; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _names(path, file.fileno()):
                continue  # whoever held it was done and has removed it
            try:
                file.truncate(0)
                print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
                yield
            finally:
                with suppress(OSError):
                    path.unlink()
            return


def _names(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
