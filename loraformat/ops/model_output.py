"""The transaction of every verb that writes a model: write, check the inputs, publish."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from loraformat.errors import InputError
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.written import WrittenModel
from loraformat.plugins import BaseFormat, WriteOptions
from loraformat.storage.atomic_file import open_publication
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.version import __version__

__all__ = ["ModelOutput", "input_paths"]


class ModelOutput:
    """An atomic model output.

    Leaving the context without an error closes the inputs, which raises if one of them changed
    meanwhile, and then publishes what was written. After an error nothing is published.

    Parameters
    ----------
    target : str or Path
    writer : BaseFormat
    inputs : sequence of Checkpoint or Adapter
        What is read, the base first. The target may be none of their files.
    plan : sequence of JSON values
        The options that decide the bytes. Only the same options, inputs and version continue
        an interrupted output.
    files : sequence of Path
        More files that are read.
    force : bool
        Replace a model that stands at the target.
    progress : callable
        Called with the bytes written and the bytes in total.

    Attributes
    ----------
    publication : AtomicOutput

    Raises
    ------
    OutputError
        On entering, if the target is an input or exists.
    FileChangedError
        On leaving, if an input changed while it was read.
    """

    def __init__(
        self,
        target: str | Path,
        writer: BaseFormat,
        *,
        inputs: Sequence[Checkpoint | Adapter],
        plan: Sequence[Any],
        files: Sequence[Path] = (),
        force: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._writer, self._inputs, self._progress = writer, inputs, progress
        read = [path for one in inputs for path in one.sources] + list(files)
        states = [(path.name, path.stat()) for path in read]
        stamps = [[name, state.st_size, state.st_mtime_ns] for name, state in states]
        self.publication = open_publication(
            writer.output,
            Path(target),
            plan=json.dumps([__version__, writer.name, *plan, stamps]),
            inputs=input_paths(inputs, files),
            force=force,
        )
        self._committing = self.publication
        self._stack = ExitStack()

    def __enter__(self) -> ModelOutput:
        self._stack.enter_context(self.publication)
        return self

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> WrittenModel:
        """Write a checkpoint into the work directory.

        The options' ``progress`` is set here. An `InputError` of a tensor names the base's file.
        """
        total, done = sum(tensor.nbytes for tensor in checkpoint.tensors.values()), 0

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            self._progress(done, total)

        assert self._writer.write is not None
        options = replace(options, progress=count)
        try:
            return self._writer.write(checkpoint, self.publication, options)
        except InputError as error:  # a tensor knows its name, not its file
            error.path = error.path or str(self._inputs[0].path)
            raise

    def publish_with(self, record: AtomicOutput) -> None:
        """Enter a second publication, whose ``commit`` publishes this output too."""
        self._committing = self._stack.enter_context(record)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            for one in self._inputs:
                one.close()
            self._committing.commit()


def input_paths(inputs: Sequence[Checkpoint | Adapter], files: Sequence[Path] = ()) -> list[Path]:
    """Return every existing input file and directory."""
    paths = [path for one in inputs for path in (one.path, *one.sources)]
    return [path for path in (*paths, *files) if path.exists()]
