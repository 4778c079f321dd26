"""NumPy models for loraformat: a directory with ``model.npz``, ``npz.json`` and ``config.json``.

``model.npz`` is an uncompressed zip archive with one ``.npy`` file per tensor; ``npz.json`` gives
each tensor's dtype and shape, because NumPy has no bfloat16: such tensors are stored as integers
of the same size. NF4 weights are written dense.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy

from loraformat.errors import InputError, printable
from loraformat.model import config_json
from loraformat.model.checkpoint import CarriedFile, Checkpoint, DenseTensor, Provenance
from loraformat.model.written import FileRecord, WrittenModel, WrittenShards
from loraformat.plugins import BaseFormat, ReadOptions, WriteOptions
from loraformat.storage import strict_json
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.storage.safe_paths import is_safe_path
from loraformat.tensors.dtypes import ITEM_BYTES
from loraformat.tensors.header import is_clean_name

WEIGHTS, INDEX, CONFIG = "model.npz", "npz.json", config_json.CONFIG_NAME
LONGEST_INDEX = 64 << 20
LONGEST_FILE = 128 << 20
LONGEST_NPY_HEADER = 1024


def sniff(path: Path) -> bool:
    """Tell whether a path is a model in this format, by its content, without raising."""
    return (path / INDEX).is_file() and (path / WEIGHTS).is_file()


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Open a model: the index and the archive's directory are read, no tensor is."""
    folder = SafeDirectory(path)  # never opens anything outside the directory
    index = read_index(folder)
    stream = os.fdopen(folder.open(WEIGHTS), "rb")
    try:
        archive = zipfile.ZipFile(stream)
        tensors = {name: lazy_tensor(archive, name, entry) for name, entry in index.items()}
        config = read_config(folder)
    except zipfile.BadZipFile as error:
        stream.close()
        raise InputError(f"not a zip archive: {error}", path=path / WEIGHTS) from None
    except BaseException:
        stream.close()
        raise
    names = [name for name in folder.names() if name not in (WEIGHTS, INDEX, CONFIG)]
    return Checkpoint(
        path=path,
        provenance=Provenance("npz"),
        tensors=tensors,
        config=config,
        files=tuple(carried_file(folder, name) for name in names if is_safe_path(name)),
        sources=tuple(path / name for name in folder.names()),
        left_behind=tuple(printable(name) for name in names if not is_safe_path(name)),
        close=stream.close,
    )


def read_index(folder: SafeDirectory) -> dict[str, Any]:
    """Return the index; strict JSON, because it is untrusted."""
    try:
        index = strict_json.loads(folder.read(INDEX, LONGEST_INDEX))
    except strict_json.StrictJsonError as error:
        raise InputError(f"not strict JSON: {error}", path=folder.path / INDEX) from None
    if not isinstance(index, dict) or not all(map(is_clean_name, index)):
        raise InputError("not a JSON object of tensor names", path=folder.path / INDEX)
    return index


def read_config(folder: SafeDirectory) -> bytes | None:
    """Return ``config.json``, if there is one."""
    return folder.read(CONFIG, config_json.MAX_CONFIG_BYTES) if folder.has(CONFIG) else None


def carried_file(folder: SafeDirectory, name: str) -> CarriedFile:
    """Return a carried file; it is read when a writer needs it."""
    return CarriedFile(name, folder.size(name), lambda: folder.read(name, LONGEST_FILE))


def lazy_tensor(archive: zipfile.ZipFile, name: str, entry: Any) -> DenseTensor:
    """Return a tensor that is read when it is loaded, after checking its size now."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape)} if dtype in ITEM_BYTES and all(
            type(n) is int and 0 <= n < 1 << 48 for n in shape
        ):
            pass
        case _:
            raise InputError(f"tensor {printable(name)} has no dtype and shape", path=INDEX)
    tensor = DenseTensor(name, dtype, tuple(shape), lambda: load(archive, tensor))
    try:
        member = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise InputError(f"tensor {printable(name)} is missing", path=WEIGHTS) from None
    header = member.file_size - tensor.nbytes
    if member.compress_type != zipfile.ZIP_STORED or not 0 < header <= LONGEST_NPY_HEADER:
        raise InputError(f"tensor {printable(name)} is not as long as it should be", path=WEIGHTS)
    return tensor


def load(archive: zipfile.ZipFile, tensor: DenseTensor) -> memoryview:
    """Read one tensor and compare it with what the index promised."""
    try:
        with archive.open(f"{tensor.name}.npy") as file:
            array = numpy.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"tensor {printable(tensor.name)}: {error}", path=WEIGHTS) from None
    if array.dtype != storage_type(tensor.dtype) or array.shape != tensor.shape:
        raise InputError(f"tensor {printable(tensor.name)} is not as {INDEX} says", path=WEIGHTS)
    return memoryview(numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8).data)


def storage_type(dtype: str) -> numpy.dtype[Any]:
    """Return the NumPy type that stores a safetensors type: itself, or an integer as large."""
    kind = "u" if dtype in ("BOOL", "BF16", "F8_E4M3", "F8_E5M2") else dtype[0].lower()
    return numpy.dtype(f"<{kind}{ITEM_BYTES[dtype]}")


def write(checkpoint: Checkpoint, publication: AtomicOutput, options: WriteOptions) -> WrittenModel:
    """Write a model, one tensor in memory at a time, into the publication's work directory."""
    publication.check_space(sum(tensor.nbytes for tensor in checkpoint.tensors.values()))
    tensors = [tensor for tensor in checkpoint.tensors.values() if isinstance(tensor, DenseTensor)]
    with (
        publication.create(WEIGHTS) as file,
        # Buffered: a bare file may take fewer bytes than it is given, and zipfile does not look.
        os.fdopen(file.fileno(), "wb", closefd=False) as stream,
        zipfile.ZipFile(stream, "w") as archive,
    ):
        for tensor in tensors:
            # A ZipInfo without a date: the same model gives the same bytes on every day.
            info = zipfile.ZipInfo(f"{tensor.name}.npy")
            with archive.open(info, "w", force_zip64=True) as member:
                write_array(member, tensor)
            tensor.release()
            options.progress(tensor.nbytes)
    index = {tensor.name: {"dtype": tensor.dtype, "shape": tensor.shape} for tensor in tensors}
    files = {INDEX: json.dumps(index).encode()}
    if checkpoint.config is not None:
        files[CONFIG] = checkpoint.config
    for carried in checkpoint.files:
        if not is_safe_path(carried.path):
            raise InputError(f"file name {printable(carried.path)} cannot be carried over")
        files[carried.path] = carried.read()
    for name, data in files.items():
        publication.write(name, data)
    sizes = {name: len(data) for name, data in files.items()}
    sizes[WEIGHTS] = (publication.work / WEIGHTS).stat().st_size
    return WrittenModel(WrittenShards(), {name: FileRecord(n, "") for name, n in sizes.items()})


def write_array(file: IO[bytes], tensor: DenseTensor) -> None:
    """Write one array as NumPy does, without copying it."""
    stored = storage_type(tensor.dtype)
    numpy.lib.format.write_array_header_1_0(
        file, {"descr": stored.str, "fortran_order": False, "shape": tensor.shape}
    )
    file.write(tensor.load())


CONVERTER = BaseFormat(
    name="npz",
    summary="NumPy: an uncompressed .npz archive and config.json",
    sniff=sniff,
    read=read,
    write=write,
    stores="dense",
    loses=("the manifest with its hashes and fingerprint",),
)
