"""Undoing a merge, with or without its undo record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from loraformat import plugins
from loraformat.errors import FormatError, InputError, UsageError
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.vocabulary import per_token, tokenizer_files
from loraformat.ops.arguments import Progress, byte_count, many, reported
from loraformat.ops.merge.recorder import adapter_digest
from loraformat.ops.merge.tokenizers import still_prompted_by
from loraformat.ops.model_output import ModelOutput
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.opening.model import open_model
from loraformat.ops.unmerge.subtract import UnmergeReport, subtract
from loraformat.ops.unmerge.undoing import Undoing
from loraformat.plugins import WriteOptions
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors.mapped import MappedFile
from loraformat.undo.record import UndoRecord
from loraformat.undo.rules import parse_record

__all__ = ["UnmergeReport", "unmerge"]


def unmerge(
    merged: str | Path,
    output: str | Path,
    *,
    to: str | None = None,
    undo: str | Path | None = None,
    adapter: str | Path | Adapter | Sequence[str | Path | Adapter] = (),
    weight: float | Sequence[float] = (),
    allow_pickle: bool = False,
    max_shard_size: int | str = "2GB",
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = False,
) -> UnmergeReport:
    """Undo a merge and restore the base.

    With its undo record the base is restored bit for bit, verified by hash; undo several merges in
    reverse order. Without one the adapters are subtracted, which is only approximate.

    Parameters
    ----------
    merged : str or Path
        What `merge` wrote.
    output : str or Path
        Output directory.
    to : str, optional
        Format of `output`. [default: safetensors]
    undo : str or Path, optional
        The undo record written by `merge --undo`.
    adapter : str, Path, Adapter or a sequence of them
        With `undo`: current location of a merged adapter. Without: adapter to subtract.
    weight : float or sequence of float
        Without `undo`: weight of each adapter. [default: 1]
    allow_pickle : bool
        As in `convert`.
    max_shard_size, force
        As in `merge`.
    dry_run : bool
        Check that record, model and adapters match without writing anything.
    progress
        As in `convert`.

    Returns
    -------
    UnmergeReport

    Raises
    ------
    FormatError
        If record, model and adapters do not belong together.
    """
    adapters, limit = many(adapter), byte_count(max_shard_size, "max-shard-size")
    if undo is None:
        return subtract(
            merged, output, adapters, many(weight), allow_pickle=allow_pickle, to=to,
            max_shard_size=limit, force=force, dry_run=dry_run, progress=progress,
        )  # fmt: skip
    if many(weight):
        raise UsageError("the undo record contains the weights; omit --weight")
    began = time.perf_counter()
    writer = plugins.for_output(Path(output), to, plugins.BaseFormat, "safetensors")
    if writer.stores != "dense":
        raise UsageError(f"{writer.name} stores NF4, and the original's weights are dense")
    with ExitStack() as stack:
        told = stack.enter_context(reported(progress, "unmerge"))
        checkpoint = stack.enter_context(open_model(merged))
        path = Path(undo)
        file = MappedFile(SafeDirectory(path.absolute().parent), path.name)
        stack.callback(file.close)
        record = parse_record(file.header, path)
        undoing = Undoing(checkpoint, record, file)
        original = undoing.checkpoint()
        undoing.adapters = _adapters(stack, original, record, adapters, allow_pickle)
        report = UnmergeReport(
            source=str(merged),
            target=str(output),
            exact=True,
            tensors=len(original.tensors),
            restored=sum(tensor.mode != "new" for tensor in record.tensors.values()),
            output_bytes=sum(tensor.nbytes for tensor in original.tensors.values()),
            notes=[
                *_tokenizer_note(checkpoint, original),
                *still_prompted_by(checkpoint.files, undoing.adapters),
            ],
            dry_run=dry_run,
        )
        if dry_run:
            return report
        with ModelOutput(
            output,
            writer,
            inputs=[checkpoint, *undoing.adapters],
            files=[path],
            plan=["unmerge", limit],
            force=force,
            progress=told,
        ) as out:
            written = out.write(original, WriteOptions(limit))
            undoing.check(written.shards.tensors)
            file.close()
    return replace(
        report,
        output_bytes=written.nbytes,
        notes=[*report.notes, *written.notes],
        seconds=time.perf_counter() - began,
    )


def _tokenizer_note(merged: Checkpoint, original: Checkpoint) -> list[str]:
    """Return a note on the output's tokenizer, if the merge changed the vocabulary."""
    now, then = (set(per_token(model.tensors).values()) for model in (merged, original))
    if now == then or not tokenizer_files(merged.files):
        return []
    return [
        f"the vocabulary again has {max(then, default=0)} tokens, but the tokenizer is still that "
        "of the merged model; replace it with that of the base"
    ]


def _adapters(
    stack: ExitStack,
    original: Checkpoint,
    record: UndoRecord,
    given: Sequence[str | Path | Adapter],
    allow_pickle: bool,
) -> list[Adapter]:
    """Open the record's adapters and check that they match it."""
    if given and len(given) != len(record.adapters):
        raise UsageError(f"{len(given)} adapters, the undo record is for {len(record.adapters)}")
    if not any(tensor.terms for tensor in record.tensors.values()):
        return []
    opened = []
    for number, known in enumerate(record.adapters):
        source = given[number] if given else known.path
        try:
            opened_one = open_adapter(source, base=original, allow_pickle=allow_pickle)
            adapter = stack.enter_context(opened_one)
        except InputError as error:
            error.hint = error.hint or "give its current location with --adapter"
            raise
        if adapter_digest(adapter) != known.sha256:
            raise FormatError(
                "U05", "is not the adapter that was merged, or was modified since",
                path=adapter.path, hint="give the right one with --adapter",
            )  # fmt: skip
        opened.append(adapter)
    return opened
