"""Reading model directories: weights, config, carried files.

`open_model` finds the safetensors files of a directory (or takes a single file), checks
their headers, puts NF4 weights together, and carries every other file along. What makes
a dense model or a bitsandbytes checkpoint of it is decided in the converters.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from loraformat.errors import InputError, printable
from loraformat.model import config_json
from loraformat.model.adapter import is_adapter_file
from loraformat.model.checkpoint import CarriedFile, Checkpoint, LazyTensor, Provenance
from loraformat.model.quantization_history import from_metadata
from loraformat.shards import index_json
from loraformat.shards.stored_tensors import collect
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.storage.safe_paths import MANIFEST_NAME, is_safe_path
from loraformat.tensors.header import Entry
from loraformat.tensors.mapped import MappedFile

__all__ = ["as_checkpoint", "open_model", "peek_config", "stored_entries", "weight_files"]

_SINGLE = "model.safetensors"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|tflite|npz|mlmodel)$"
    r"|\.(safetensors|bin|h5|msgpack)\.index(\.[\w-]+)?\.json$"
)
_MAX_CARRIED_BYTES = 128 << 20


def open_model(
    path: Path,
    format_name: str,
    *,
    transposed: Callable[[str], bool] = lambda name: False,
    any_storage: bool = False,
) -> Checkpoint:
    """Open a model directory, or one safetensors file, as a lazy checkpoint.

    It is on mapped files: no weight has been read. `format_name` is for its provenance; for
    `transposed` and `any_storage` see `loraformat.shards.stored_tensors.collect`. Raises
    `InputError` if files are missing, damaged or hostile.
    """
    alone = path.is_file()
    folder = SafeDirectory(path.parent if alone else path)
    names = [path.name] if alone else weight_files(folder)
    with contextlib.ExitStack() as opened:
        files = [MappedFile(folder, name, foreign=True) for name in names]
        for file in files:
            opened.callback(file.close)
        tensors = collect(files, transposed=transposed, any_storage=any_storage)
        indexed = not alone and folder.has(index_json.INDEX_NAME) and names != [_SINGLE]
        if indexed:
            homes = {name: file.path.name for file in files for name in file.header.entries}
            place = folder.path / index_json.INDEX_NAME
            index_json.check_homes(_weight_map(folder), homes, place)
        origin = Provenance(format_name, quantized=from_metadata(files[0].header.metadata))
        if alone:
            close = opened.pop_all().close
            return Checkpoint(path, origin, tensors, sources=(path,), close=close)
        if indexed:
            names = [*names, index_json.INDEX_NAME]
        model = as_checkpoint(path, format_name, names, tensors, opened.pop_all().close)
        model.provenance = origin
        return model


def as_checkpoint(
    path: Path,
    format_name: str,
    names: Sequence[str],
    tensors: dict[str, LazyTensor],
    close: Callable[[], None],
) -> Checkpoint:
    """Return a model directory's tensors with its config and the carried files.

    `names` are the files that hold the tensors, or say where they are. Raises `InputError` if the
    config is none.
    """
    folder = SafeDirectory(path)
    config, quantization = _config(folder)
    carried, left_behind = _carry(folder, names)
    others = [file.path for file in carried]
    others += [config_json.CONFIG_NAME] if config is not None else []
    return Checkpoint(
        path=path,
        provenance=Provenance(format_name),
        tensors=tensors,
        config=config,
        quantization_config=quantization,
        files=tuple(carried),
        sources=tuple(folder.path / name for name in [*names, *others]),
        left_behind=tuple(left_behind),
        close=close,
    )


def peek_config(path: Path) -> dict[str, Any]:
    """Return a model directory's config for format detection; empty if unreadable."""
    try:
        folder = SafeDirectory(path)
        return config_json.parse(folder.read(config_json.CONFIG_NAME, config_json.MAX_CONFIG_BYTES))
    except InputError:
        return {}


def stored_entries(path: Path) -> dict[str, Entry]:
    """Return the header entries of a model's tensors for format detection.

    Empty for a model that cannot be opened: reading it will say what is wrong.
    """
    if path.is_file() and path.suffix != ".safetensors":
        return {}
    entries: dict[str, Entry] = {}
    try:
        folder = SafeDirectory(path if path.is_dir() else path.parent)
        for name in weight_files(folder) if path.is_dir() else [path.name]:
            with contextlib.closing(MappedFile(folder, name, foreign=True)) as file:
                entries |= file.header.entries
    except InputError:
        return {}
    return entries


def _config(folder: SafeDirectory) -> tuple[bytes | None, dict[str, Any] | None]:
    name = config_json.CONFIG_NAME
    if not folder.has(name):
        return None, None
    return config_json.split(folder.read(name, config_json.MAX_CONFIG_BYTES), folder.path / name)


def weight_files(folder: SafeDirectory) -> list[str]:
    """Return the safetensors files that make up the model, as transformers would choose them.

    ``model.safetensors`` alone, if it is there; else the index decides; else every safetensors file
    of the directory, of which numbered ones must be complete. Raises `InputError` if there are
    none, or one is missing.
    """
    numbered: Iterable[str] = ()
    if folder.has(_SINGLE):
        names = [_SINGLE]
    elif folder.has(index_json.INDEX_NAME):
        names = sorted(set(_weight_map(folder).values()))
    else:
        found = (p.name for p in folder.path.glob("*.safetensors"))
        names = sorted(name for name in found if not is_adapter_file(name))
        numbered = _numbered(names)
    if not names:
        raise InputError("holds no .safetensors file", path=folder.path)
    for name in chain(names, numbered):
        if not folder.has(name):
            raise InputError(
                "is missing",
                path=folder.path / name,
                hint="the download is incomplete; download it again",
            )
    return names


def _numbered(names: Iterable[str]) -> Iterator[str]:
    """Yield the names of all shards that the numbered ones among some names speak of."""
    series = {(match["stem"], match["count"]) for match in map(_NUMBERED.fullmatch, names) if match}
    for stem, count in series:
        for number in range(1, int(count) + 1):
            yield f"{stem}-{number:05d}-of-{count}.safetensors"


def _weight_map(folder: SafeDirectory) -> dict[str, str]:
    raw = folder.read(index_json.INDEX_NAME, index_json.MAX_INDEX_BYTES)
    return index_json.parse_index(raw, folder.path / index_json.INDEX_NAME)[0]


def _carry(folder: SafeDirectory, weights: Sequence[str]) -> tuple[list[CarriedFile], list[str]]:
    """Split the other files into carried ones and, with a reason, those left behind."""
    carried: list[CarriedFile] = []
    left_behind: list[str] = []
    for name in folder.names():
        if name in (*weights, config_json.CONFIG_NAME, MANIFEST_NAME):
            continue
        size = folder.size(name)
        if _WEIGHTS.search(name):
            left_behind.append(f"{printable(name)} (weights that transformers would not load)")
        elif not is_safe_path(name):
            left_behind.append(f"{printable(name)} (its name is not portable)")
        elif any(name.lower() == other.path.lower() for other in carried):
            left_behind.append(f"{printable(name)} (its name differs from another only in case)")
        elif size > _MAX_CARRIED_BYTES:
            left_behind.append(f"{printable(name)} ({size / 1e6:.0f} MB)")
        else:
            carried.append(CarriedFile(name, size, partial(folder.read, name, size)))
    return carried, left_behind
