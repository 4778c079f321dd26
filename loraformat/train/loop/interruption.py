"""Ctrl-C and SIGTERM during training: at once where that is harmless, later where it is not.

A step that is still being computed can be given up: nothing has changed yet. An update of the
parameters, and a checkpoint that is being written, end first.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["Interruption"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Catches the signals; a context manager. `wanted` tells whether one has come.

    A `patient` one never raises, only notes: several ranks have to stop after the same step.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.wanted = False
        self._patient = patient
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._come)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _come(self, number: int, frame: FrameType | None) -> None:
        again, self.wanted = self.wanted, True
        # A second Ctrl-C does not wait for anything.
        if not self._patient and (self._at_once or again):
            self._at_once = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal raise `KeyboardInterrupt` inside this block, and not only be noted."""
        self._at_once = not self._patient
        try:
            if self.wanted and not self._patient:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False
