"""Error message for a mapped file that is truncated while it is read (SIGBUS).

A mapped file that another program truncates, or a disk that fails, sends SIGBUS to whoever looks at
the bytes that are gone. No Python runs then: the handler is in the compiled library.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

__all__ = ["say_truncated"]

_LIBRARIES = Path(__file__).parents[1] / "nf4" / "kernels"


def say_truncated() -> bool:
    """Install a SIGBUS handler that prints a message and exits with status 3.

    For programs, not for libraries: a process has one handler of a signal. False if there is no
    compiled library to do it: the kernel ends the process, then, as it does any other
    (``LORAFORMAT_IO=pread`` maps nothing).
    """
    for path in sorted(_LIBRARIES.glob("_nf4.*")):
        try:
            return bool(ctypes.CDLL(str(path)).say_truncated() == 0)
        except (OSError, AttributeError):  # another machine's, or another version's
            continue
    return False
