"""SIGTERM and SIGINT, by which a run is asked to save and to stop."""

import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

log = logging.getLogger(__name__)

ENDING = (signal.SIGTERM, signal.SIGINT)
ECHO = 1.0  # seconds in which `uv run` and others pass a signal on that has reached the whole group of processes already


class Stopping(threading.Event):
    """Set when a run is to save and to stop; `held` while the run waits for who iterates over its rows."""

    held = False
    first = math.inf  # when Python handled the first signal

    @contextmanager
    def hold(self) -> Iterator[None]:
        self.held = True
        try:
            yield
        finally:
            self.held = False


_events: list[Stopping] = []  # of the runs that are under way
_handlers = ExitStack()  # there is one set of them in a process


def heeded() -> list[signal.Signals]:
    """Of SIGTERM and SIGINT those that this process was not started to ignore, as a script's background job is SIGINT, and
    that no program around Python handles.
    """
    return [kind for kind in ENDING if signal.getsignal(kind) not in (signal.SIG_IGN, None)]


def second_signal() -> Callable[..., None]:
    """What to do at signals after a first, which came now: `(number, *_)` ends the process, unless it is an `ECHO`."""
    first = time.monotonic()

    def again(number: int, *_) -> None:
        if time.monotonic() - first > ECHO:
            os._exit(128 + number)

    return again


@contextmanager
def stopping() -> Iterator[Stopping]:
    """An event that the first of the `heeded` signals sets; a second one, not its `ECHO`, ends the process at once.

    While all runs are `held`, that second one is what it was before the runs: in a notebook a KeyboardInterrupt. Runs of one
    process may overlap: a signal stops them all. Processes that it forks meanwhile heed signals as before.
    """
    event = Stopping()
    if not _in_main_thread():
        yield event
        return
    _events.append(event)  # before there are handlers: a signal that they take has an event to set
    try:
        if len(_events) == 1:
            _handlers.close()  # of a run that ended in another thread
            _handlers.enter_context(_handled())
        yield event
    finally:
        if _events == [event] and _in_main_thread():  # others cannot set handlers; the next signal takes these away
            _handlers.close()  # while there is an event for a signal that they still take
        with suppress(ValueError):  # in a forked process it is none of these
            _events.remove(event)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _forked() -> None:
    """Gives a forked process the handlers that its parent had before its runs."""
    _handlers.close()
    for event in _events:
        event.held = False  # it is the parent's run that waits
    _events.clear()


os.register_at_fork(after_in_child=_forked)


@contextmanager
def _handled() -> Iterator[None]:
    heard, told = socket.socketpair()
    told.setblocking(False)
    watch = threading.Thread(target=_watch, args=(heard,), daemon=True)
    before = {kind: signal.getsignal(kind) for kind in heeded()}
    wakeup = signal.set_wakeup_fd(told.fileno())
    try:
        for kind in before:
            signal.signal(kind, _stop)
        watch.start()
        yield
    finally:
        if (current := signal.set_wakeup_fd(wakeup)) != told.fileno():
            signal.set_wakeup_fd(current)  # which somebody has set since, as with handlers
        for kind, handler in before.items():
            if signal.getsignal(kind) == _stop:
                signal.signal(kind, handler)
        told.close()
        if watch.is_alive():  # not in a forked process
            watch.join()
        heard.close()


def _stop(number: int, *_) -> None:
    now = time.monotonic()
    # None: the runs have ended, the last one in another thread.
    if all(event.held and now - event.first > ECHO for event in _events):
        _handlers.close()
        _events.clear()
        if signal.getsignal(number) == _stop:  # put back by somebody who had set another meanwhile
            signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    for event in _events:
        event.first = min(event.first, now)
    _tell()


def _tell() -> None:
    for event in _events:
        event.set()


def _watch(heard: socket.socket) -> None:
    """Reads the numbers of signals as they come: Python's handlers wait where XLA compiles, for a minute at times."""
    told, again = [], second_signal()
    while number := heard.recv(1):
        if number[0] not in ENDING or not _events:
            continue
        if all(event in told for event in _events):
            if not all(event.held for event in _events):  # see `_stop`
                again(number[0])
            continue
        told, again = [*_events], second_signal()
        _tell()
        log.warning("stopping as soon as what is under way is done and saved; a second signal stops at once")
