"""The commands, `python -m experiments.rotation` and so on; what is here runs before any of them is imported."""

import os
import signal
import sys
from contextlib import suppress

HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"


def _with_huge_pages():
    """Begins anew with huge pages for malloc where Linux gives them only if asked: a step's temporary arrays are new pages
    each time, and to fault them in by 4 kB takes a good part of a step."""
    with suppress(OSError), open(HUGE_PAGES) as file:
        if "[madvise]" in file.read() and "GLIBC_TUNABLES" not in os.environ:
            os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
            os.execv(sys.executable, sys.orig_argv)


def _with_streams():
    """Opens what the shell has closed of stdin, stdout and stderr: a file of the run would get its number and its lines."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = sys.stdout or open(1, "w", closefd=False), sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _stop(number, frame):
    with suppress(OSError):
        os.write(2, b"rotjax: stopped before anything was done; run it again\n")
    os._exit(75)


if sys.argv[:1] == ["-m"]:  # `python -m experiments.<command>` has just begun, and imports for seconds
    _with_streams()
    _with_huge_pages()
    for kind in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(kind) != signal.SIG_IGN:
            signal.signal(kind, _stop)
