"""Metrics of a run: one JSON object per line, cut back to the checkpoint on resumption."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loraformat.errors import MissingDependencyError

__all__ = ["Metrics", "check_tensorboard", "read_metrics"]


def check_tensorboard() -> None:
    """Raise `MissingDependencyError` if TensorBoard's writer is not installed."""
    if find_spec("tensorboard") is None:
        raise MissingDependencyError(
            "writing for TensorBoard needs tensorboard",
            hint="run: pip install 'loraformat[tensorboard]'",
        )


class Metrics:
    r"""Writer of ``metrics.jsonl``, and optionally of TensorBoard's files.

    Kept of existing files are the `position` bytes that the checkpoint knew of, and for TensorBoard
    the steps before `step`.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> with Metrics(path) as metrics:
    ...     metrics.add({"step": 1, "loss": 2.5})
    >>> path.read_text()
    '{"step": 1, "loss": 2.5}\n'
    """

    def __init__(
        self, path: Path, *, position: int = 0, tensorboard: Path | None = None, step: int = 0
    ) -> None:
        self._file = path.open("ab")
        self._file.truncate(min(position, path.stat().st_size))
        self._board: Any = None
        if tensorboard is not None:
            check_tensorboard()
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(tensorboard), purge_step=step)

    def add(self, members: dict[str, Any]) -> None:
        """Append one object; ``step`` is among its members."""
        self._file.write(json.dumps(members, ensure_ascii=False).encode("utf-8") + b"\n")
        self._file.flush()
        if self._board is not None:
            self._tell_board(members)

    def _tell_board(self, members: dict[str, Any]) -> None:
        for name, value in members.items():
            if name == "step":
                continue
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, members["step"])
            elif name == "text":
                shown = f"{members['prompt']}⟦{value}⟧"
                self._board.add_text("sample", shown, members["step"])

    def position(self) -> int:
        """Return the length of the file, which is on the disk then (bytes)."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a record; a line that a crash has cut off is left out."""
    with path.open("rb") as file:
        return [json.loads(line) for line in file if line.endswith(b"\n")]
