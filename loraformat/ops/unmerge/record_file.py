"""The undo record file, published together with its model."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from loraformat.errors import LoraFormatError, OutputError
from loraformat.storage.atomic_file import AtomicFile
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.storage.durable import sync_directory
from loraformat.storage.output_rules import refuse_input_as_output
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors.mapped import MappedFile
from loraformat.undo.record import METADATA_KEY

__all__ = ["RecordPublication", "refuse_record_path"]

_REPLACED = ".replaced"
_ANOTHER = "choose another file"


def refuse_record_path(path: Path, target: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Refuse before a merge where its undo record could not, or must not, be written.

    Parameters
    ----------
    path : Path
        Of the record.
    target : Path
        The merged model. Where an interrupted merge to it waits to be continued, its record may
        stand already.
    inputs : sequence of Path
        The base, the adapters and their files.
    force : bool
        Replace an undo record.

    Raises
    ------
    OutputError
        If the path is or lies in an input or the output, or something stands there that is not
        an undo record, or one does and neither ``force`` nor an interrupted merge allows it.
    """
    path, target = Path(os.path.abspath(path)), Path(os.path.abspath(target))
    refuse_input_as_output(path, path.with_name(path.name + ".partial"), inputs)
    real, output = path.resolve(), target.resolve()
    if real.is_relative_to(output) or output.is_relative_to(real):
        raise OutputError("is, contains or is inside the output", path=path, hint=_ANOTHER)
    if not path.parent.is_dir():
        raise OutputError("no such directory", path=path.parent, hint="create it first")
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file() or not _is_record(path):
        raise OutputError(
            "exists, is not an undo record and will not be replaced", path=path, hint=_ANOTHER
        )
    if not force and not target.with_name(target.name + ".partial").is_dir():
        raise OutputError("already exists", path=path, hint="use --force to replace it")


def _is_record(path: Path) -> bool:
    if not path.stat().st_size:
        return True
    try:
        file = MappedFile(SafeDirectory(path.parent), path.name)
    except LoraFormatError:
        return False
    with closing(file):
        return METADATA_KEY in file.header.metadata


class RecordPublication(AtomicFile):
    """An undo record that is written before its model appears, and appears with it.

    Parameters
    ----------
    path : Path
    model : AtomicOutput
        Of the merged model.
    inputs : sequence of Path
    force : bool

    Notes
    -----
    `commit` publishes both. A kill in between leaves the record and the model's finished shards:
    the same command continues, and accepts that record if it is the same, byte for byte. A
    failure takes the record back.
    """

    def __init__(
        self, path: Path, model: AtomicOutput, inputs: Sequence[Path], *, force: bool
    ) -> None:
        super().__init__(path, plan="undo record", inputs=inputs, force=force)
        self._model, self._sources = model, list(inputs)

    def _refuse_existing(self) -> None:
        refuse_record_path(self.target, self._model.target, self._sources, force=self._force)

    def commit(self) -> None:
        """Let the record appear, and the model.

        Raises
        ------
        OutputError
            If another record stands there, or the model cannot appear; neither does then.
        """
        written, replaced = self.work / self.file_name, self.work / _REPLACED
        stood = self.target.is_file()
        same = stood and filecmp.cmp(written, self.target, shallow=False)
        if stood and not same:
            if not self._force:
                raise OutputError("belongs to another merge", path=self.target, hint="use --force")
            os.rename(self.target, replaced)
        if not same:
            self._appear(written)
            sync_directory(self.target.parent)
        try:
            self._model.commit()
        except BaseException:
            if not same and not self._model.published:
                os.unlink(self.target)
                if replaced.exists():
                    os.rename(replaced, self.target)
                sync_directory(self.target.parent)
            raise
        self._remove_work()
