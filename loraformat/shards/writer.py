"""Streaming shard writer with hashing.

`write_shards` walks over lazy tensors. While one is computed, a second thread hashes
and writes the ones before it, so that computing and the disk overlap; how much waits in
memory is bounded. The header of a shard is written last, into room that
was left for it, because the length of a quant state is known only once its weight is
quantized. A finished shard is journaled: after an interruption it is hashed again, and
the run continues behind it.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from hashlib import sha256
from typing import Any, BinaryIO

from loraformat.errors import InputError
from loraformat.model.checkpoint import LazyTensor, NF4Tensor
from loraformat.model.nf4_parts import NF4Parts, content_digest
from loraformat.model.written import ShardRecord, TensorRecord, WrittenShards
from loraformat.nf4.quant_state import LONGEST_OFFSET
from loraformat.shards.layout import Placed, body_order, shard_name, tail_order
from loraformat.shards.stored_tensors import collect
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.storage.background import BackgroundConsumer
from loraformat.storage.durable import write_all
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors.header import DATA_ALIGNMENT, Entry, encode_header
from loraformat.tensors.mapped import MappedFile

__all__ = ["planned_bytes", "write_shards"]

_METADATA = {"format": "pt"}

Progress = Callable[[int], None]


def planned_bytes(shards: Sequence[Sequence[LazyTensor]]) -> int:
    """Return an upper bound of the bytes that shards will take on disk."""
    return sum(_Plan(tensors).upper_bound for tensors in shards)


def write_shards(
    shards: Sequence[Sequence[LazyTensor]],
    publication: AtomicOutput,
    *,
    progress: Progress = lambda nbytes: None,
    single_name: str | None = None,
    metadata: Mapping[str, str] = _METADATA,
) -> WrittenShards:
    """Write all shards of a checkpoint, from `loraformat.shards.layout.plan_shards`.

    What it returns is the same whether or not the run was interrupted in between. `progress` is
    called with the bytes of each tensor, as ``tensor.nbytes`` counts them, when it is written;
    `single_name` is the file name if there is one shard only (``model.safetensors``); `metadata` is
    ``__metadata__`` of every shard.
    """
    written = WrittenShards()
    for number, tensors in enumerate(shards):
        name = shard_name(number, len(shards))
        if single_name is not None and len(shards) == 1:
            name = single_name
        done = _resumed(tensors, name, publication)
        if done is None:
            done = _write_shard(_Plan(tensors, metadata), name, publication, progress)
            publication.record(name, done)
        else:
            progress(sum(tensor.nbytes for tensor in tensors))
        _add(written, name, tensors, done)
    return written


def _resumed(
    tensors: Sequence[LazyTensor], name: str, publication: AtomicOutput
) -> Mapping[str, Any] | None:
    """Return the record of a shard from an interrupted run, if its bytes are unchanged."""
    done = publication.resumed.get(name)
    if done is None:
        return None
    try:
        with closing(MappedFile(SafeDirectory(publication.work), name, profile=True)) as file:
            whole = (
                done["bytes"] == file.nbytes
                and done["header_sha256"] == file.header_sha256
                and done["stored"] == list(file.header.entries)
                and done["tensor_bytes"] == sum(e.nbytes for e in file.header.entries.values())
                and list(done["tensors"]) == [tensor.name for tensor in tensors]
                and {key: facts[0] for key, facts in done["tensors"].items()} == _digests(file)
            )
    except (InputError, LookupError, TypeError, AttributeError):
        return None
    return done if whole else None


def _digests(file: MappedFile) -> dict[str, str]:
    digests = {}
    for name, tensor in collect([file]).items():
        digests[name] = content_digest(tensor.load())
        tensor.release()
    return digests


def _add(
    written: WrittenShards, name: str, tensors: Sequence[LazyTensor], done: Mapping[str, Any]
) -> None:
    written.shards.append(ShardRecord(name, done["bytes"], done["header_sha256"]))
    written.weight_map.update(dict.fromkeys(done["stored"], name))
    written.total_bytes += done["tensor_bytes"]
    for tensor in tensors:
        digest, error = done["tensors"][tensor.name]
        record = TensorRecord("dense", tensor.dtype, tensor.shape, digest)
        if isinstance(tensor, NF4Tensor):
            layout = tensor.block_size, tensor.double_quant, tensor.transposed
            more = *layout, error, tensor.segments
            record = TensorRecord("nf4", tensor.dtype, tensor.shape, digest, *more)
        written.tensors[tensor.name] = record


class _Plan:
    """Tensor offsets of one shard, fixed before anything is computed."""

    def __init__(
        self, tensors: Sequence[LazyTensor], metadata: Mapping[str, str] = _METADATA
    ) -> None:
        self.tensors, self.metadata = tensors, metadata
        self.body = body_order(tensors)
        self.body_bytes = self.body[-1].entry.end if self.body else 0
        longest = {
            tensor.name: len(tensor.state(0.0 if tensor.double_quant else None).encode())
            + LONGEST_OFFSET
            for tensor in tensors
            if isinstance(tensor, NF4Tensor)
        }
        tail = tail_order(tensors, longest, self.body_bytes)
        # Offsets in the real tail are at most these, so its JSON is at most this long.
        self.header_bytes = len(self.header(tail, alignment=DATA_ALIGNMENT))
        self.upper_bound = self.header_bytes + (tail[-1].entry.end if tail else self.body_bytes)

    def header(self, tail: Sequence[Placed], **room: int) -> bytes:
        """Return the file's header."""
        return encode_header(
            (placed.entry for placed in (*self.body, *tail)), self.metadata, **room
        )


def _write_shard(
    plan: _Plan, name: str, publication: AtomicOutput, progress: Progress
) -> dict[str, Any]:
    with publication.create(name) as file:
        sink = _Sink(file, plan, progress)
        with BackgroundConsumer(sink.write) as background:
            for tensor in plan.tensors:
                for piece in _pieces(tensor):
                    background.put((tensor, piece), nbytes=_held_bytes(piece))
        return sink.finish()


def _pieces(tensor: LazyTensor) -> Iterable[memoryview | NF4Parts]:
    return [tensor.load()] if isinstance(tensor, NF4Tensor) else tensor.chunks()


class _Sink:
    """Writer that places tensors in one shard file and hashes them."""

    def __init__(self, file: BinaryIO, plan: _Plan, progress: Progress) -> None:
        self.file, self.plan, self.progress = file, plan, progress
        self.places = {(p.owner, p.suffix): p.entry for p in plan.body}
        self.tails: dict[str, dict[str, memoryview]] = {}
        self.hashes: dict[str, tuple[str, float | None]] = {}
        self._begun, self._digest = 0, sha256()  # of the dense tensor that is being written

    def write(self, item: tuple[LazyTensor, memoryview | NF4Parts]) -> None:
        tensor, piece = item
        if isinstance(piece, NF4Parts):
            parts = piece.by_suffix()
            self.tails[tensor.name] = {
                s: v for s, v in parts.items() if (tensor.name, s) not in self.places
            }
            self.hashes[tensor.name] = content_digest(piece), piece.relative_rms_error
            for suffix, view in parts.items():
                if entry := self.places.get((tensor.name, suffix)):
                    self._put(view, entry)
        elif not self._whole(tensor, piece):
            return
        tensor.release()
        self.progress(tensor.nbytes)

    def _whole(self, tensor: LazyTensor, piece: memoryview) -> bool:
        """Write a piece of a dense tensor, and tell whether it was the last."""
        self._digest.update(piece)
        entry = self.places[tensor.name, ""]
        self._write_at(piece, self.plan.header_bytes + entry.begin + self._begun)
        self._begun += len(piece)
        if self._begun < entry.nbytes:
            return False
        assert self._begun == entry.nbytes, f"{entry.name}: {self._begun} for {entry.nbytes} bytes"
        self.hashes[tensor.name] = self._digest.hexdigest(), None
        self._begun, self._digest = 0, sha256()
        return True

    def _put(self, data: memoryview | bytes, entry: Entry) -> None:
        assert len(data) == entry.nbytes, f"{entry.name}: {len(data)} bytes for {entry.nbytes}"
        self._write_at(data, self.plan.header_bytes + entry.begin)

    def _write_at(self, data: memoryview | bytes, position: int) -> None:
        self.file.seek(position)
        write_all(self.file, data)

    def finish(self) -> dict[str, Any]:
        states = {name: len(list(pieces.values())[-1]) for name, pieces in self.tails.items()}
        tail = tail_order(self.plan.tensors, states, self.plan.body_bytes)
        for placed in tail:
            self._put(self.tails[placed.owner][placed.suffix], placed.entry)
        header = self.plan.header(tail, room=self.plan.header_bytes)
        self._write_at(header, 0)
        stored = [placed.entry for placed in (*self.plan.body, *tail)]
        tensor_bytes = sum(entry.nbytes for entry in stored)
        return {
            "bytes": len(header) + tensor_bytes,
            "tensor_bytes": tensor_bytes,
            "header_sha256": sha256(header).hexdigest(),
            "stored": [entry.name for entry in stored],
            "tensors": {name: list(facts) for name, facts in self.hashes.items()},
        }


def _held_bytes(loaded: memoryview | NF4Parts) -> int:
    """Return the memory of loaded bytes that are not mapped from a file."""
    views = loaded.by_suffix().values() if isinstance(loaded, NF4Parts) else (loaded,)
    return sum(view.nbytes for view in views if not isinstance(view.obj, mmap.mmap))
