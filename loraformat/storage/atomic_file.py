"""Atomic output of a single file.

The file is prepared in the same work directory beside the target, with the same lock and
journal; what appears at the end is the file, and the work directory goes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from loraformat.errors import OutputError
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.storage.durable import sync_directory
from loraformat.storage.output_rules import refuse_existing_file

__all__ = ["AtomicFile", "open_publication"]


class AtomicFile(AtomicOutput):
    """A file being written; ``create(output.file_name)`` opens it.

    Parameters and errors are those of `AtomicOutput`; ``force`` replaces a file of weights.
    """

    def _refuse_existing(self) -> None:
        refuse_existing_file(self.target, force=self._force)

    def _undo_interrupted(self) -> None:
        """Do nothing: replacing a file leaves no intermediate state."""

    def commit(self) -> None:
        """Move the finished file to the target, as `AtomicOutput.commit` does a directory."""
        self._refuse_existing()
        written = self.work / self.file_name
        if self._force:
            os.replace(written, self.target)
        else:
            self._appear(written)
        self.published = True
        sync_directory(self.target.parent)
        self._remove_work()

    def _appear(self, written: Path) -> None:
        """Link the file under its name, without replacing another file."""
        try:
            os.link(written, self.target)
        except FileExistsError:
            raise OutputError(
                "has appeared meanwhile", path=self.target, hint="use --force to replace it"
            ) from None
        except OSError:  # a file system without hard links
            os.replace(written, self.target)


def open_publication(
    output: Literal["directory", "file"],
    target: Path,
    *,
    plan: str,
    inputs: Iterable[Path] = (),
    force: bool = False,
) -> AtomicOutput:
    """Return the atomic output for a converter's ``output``; parameters as `AtomicOutput`."""
    kind = AtomicFile if output == "file" else AtomicOutput
    return kind(target, plan=plan, inputs=inputs, force=force)
