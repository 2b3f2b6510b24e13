"""Commands: `python -m experiments.rotation`, `classification`, `prepare`."""

import os
import signal
import sys


def _stop(number, frame):
    os.write(2, b"rotjax: stopped; the same command goes on\n")
    os._exit(75)


if sys.argv[:1] == ["-m"]:  # `python -m experiments.<command>` has just begun, and imports for seconds
    for kind in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(kind) != signal.SIG_IGN:
            signal.signal(kind, _stop)
