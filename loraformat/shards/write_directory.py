"""Writing a model directory: shards, index, ``config.json`` and the carried files.

A bundle, a dense safetensors model and a bitsandbytes checkpoint are the same directory
but for what is added: every writer of one goes through `write_model_directory`.
"""

from __future__ import annotations

from hashlib import sha256

from loraformat.errors import UnsupportedError, printable
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.config_json import CONFIG_NAME
from loraformat.model.quantization_history import metadata_of
from loraformat.model.written import FileRecord, WrittenModel
from loraformat.plugins import WriteOptions
from loraformat.shards.index_json import INDEX_NAME, encode_index
from loraformat.shards.layout import execution_units, plan_shards
from loraformat.shards.writer import planned_bytes, write_shards
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.storage.safe_paths import is_safe_path, unlistable

__all__ = ["write_model_directory"]


def write_model_directory(
    checkpoint: Checkpoint,
    publication: AtomicOutput,
    options: WriteOptions,
    *,
    config: bytes | None,
    single_name: str | None = None,
    tell_history: bool = True,
) -> WrittenModel:
    """Write a checkpoint as a model directory.

    Parameters
    ----------
    config : bytes or None
        ``config.json``.
    single_name : str, optional
        If there is one shard only: its file name, and there will be no index.
    tell_history : bool
        Say in the shards how the numbers were quantized before, if they were.

    Raises
    ------
    ResourceError
        Before the first byte, if the disk is too small.
    """
    if not checkpoint.tensors:
        raise UnsupportedError("holds no tensors", path=checkpoint.path)
    if (name := unlistable((file.path for file in checkpoint.files), is_safe_path)) is not None:
        problem = f"file name {printable(name)} cannot be carried over"
        raise UnsupportedError(problem, path=checkpoint.path, hint="rename or remove it")
    shards = plan_shards(execution_units(checkpoint.tensors.values()), options.shard_limit)
    publication.check_space(
        planned_bytes(shards)
        + sum(file.nbytes for file in checkpoint.files)
        - _present(publication)
    )
    written = WrittenModel(
        write_shards(
            shards,
            publication,
            progress=options.progress,
            single_name=single_name,
            metadata=metadata_of(checkpoint.provenance.quantized if tell_history else ()),
        )
    )
    if single_name is None or len(shards) > 1:
        index = encode_index(written.shards.weight_map, written.shards.total_bytes)
        publication.write(INDEX_NAME, index)
    if config is not None:
        _write_file(publication, CONFIG_NAME, config, written)
    for file in checkpoint.files:
        _write_file(publication, file.path, file.read(), written)
    return written


def _present(publication: AtomicOutput) -> int:
    """Return the number of bytes that an interrupted run has already written."""
    paths = (publication.work / name for name in publication.resumed)
    return sum(path.stat().st_size for path in paths if path.is_file())


def _write_file(publication: AtomicOutput, name: str, data: bytes, written: WrittenModel) -> None:
    publication.write(name, data)
    written.files[name] = FileRecord(len(data), sha256(data).hexdigest())
