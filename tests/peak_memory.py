"""How far the peak of this process's memory rises while something is done in it."""

from contextlib import suppress
from pathlib import Path

from loraformat.train.loop.memory import peak

__all__ = ["PeakGrowth"]


class PeakGrowth:
    """The bytes by which the peak has risen since this was made.

    Linux is asked to forget the peak so far, which would hide what stays below it: that of an
    earlier test, or of the process that started this one.
    """

    def __init__(self):
        with suppress(OSError):  # no Linux, or one that does not let us
            Path("/proc/self/clear_refs").write_text("5")
        self._before = peak()

    @property
    def nbytes(self):
        return peak() - self._before
