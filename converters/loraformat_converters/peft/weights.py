"""Files with an adapter's tensors: safetensors, shards, or a pickle.

PEFT writes one safetensors file, or a pickle where it is told to; trainers that shard
everything shard adapters, too. Whatever the file, tensors come out lazily and are checked
for NaN as they are loaded.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.model.checkpoint import DenseTensor
from loraformat.model.pickled import open_pickle
from loraformat.shards.index_json import parse_index
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors.arrays import array_bytes, array_view, check_finite, numpy_dtype
from loraformat.tensors.mapped import MappedFile

__all__ = [
    "INDEX_NAME",
    "PICKLE_NAME",
    "WEIGHTS_NAME",
    "StoredTensors",
    "open_tensors",
    "other_weights",
]

WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = "adapter_model.safetensors.index.json"
PICKLE_NAME = "adapter_model.bin"

_OURS = re.compile(r"adapter_model(-\d+-of-\d+)?\.(safetensors|bin)")
_MAX_INDEX_BYTES = 64 << 20
_FLOATS = ("F64", "F32", "F16", "BF16")
#: Read as F32, which holds each of their values.
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2")


#: States of a training, which are no weights, and what lies beside an adapter on purpose
#: (adapter_model.pt is the same adapter in torchtune's own form).
_NO_WEIGHTS = re.compile(
    r"(.*/)?(optimizer|scheduler|scaler|rng_state(_\d+)?|training_args|.*_states?)\.(bin|pt|pth)"
    r"|adapter_model\.pt|global_step\d+/.*|checkpoint-\d+/.*|activation_statistics\.safetensors"
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".h5", ".msgpack")


def other_weights(names: Iterable[str]) -> list[str]:
    """Return weight files next to an adapter that PEFT does not read.

    Examples
    --------
    >>> other_weights(["adapter_model.safetensors", "non_lora_trainables.bin", "optimizer.pt"])
    ['non_lora_trainables.bin']
    """
    return [
        name
        for name in names
        if name.endswith(_WEIGHTS) and not _OURS.fullmatch(name) and not _NO_WEIGHTS.fullmatch(name)
    ]


@dataclass(slots=True)
class StoredTensors:
    """Contents of the weight files.

    Attributes
    ----------
    path : Path
        The file to name in messages.
    tensors : dict of str to DenseTensor
        By stored name.
    metadata : dict of str to str
    verbatim : bool
        PEFT reads them as they are.
    close : callable
    """

    path: Path
    tensors: dict[str, DenseTensor]
    metadata: dict[str, str] = field(default_factory=dict)
    verbatim: bool = True
    close: Callable[[], None] = lambda: None


def open_tensors(folder: SafeDirectory, *, allow_pickle: bool) -> StoredTensors:
    """Open the weight files; safetensors is preferred to pickle, as in PEFT.

    Raises
    ------
    InputError
        If there is none, or it is damaged.
    UnsupportedError
        If it is a pickle and that was not allowed.
    """
    if folder.has(WEIGHTS_NAME):
        return _open_files(folder, WEIGHTS_NAME, {WEIGHTS_NAME: None})
    if folder.has(INDEX_NAME):
        path = folder.path / INDEX_NAME
        weight_map, _ = parse_index(folder.read(INDEX_NAME, _MAX_INDEX_BYTES), path)
        shards: dict[str, set[str] | None] = {}
        for name, shard in weight_map.items():
            known = shards.setdefault(shard, set())
            assert known is not None
            known.add(name)
        return _open_files(folder, INDEX_NAME, shards)
    if not folder.has(PICKLE_NAME):
        raise InputError(
            f"holds no {WEIGHTS_NAME}", path=folder.path,
            hint="is it the directory that save_pretrained wrote? An adapter that is not called "
            "default lies in a directory of its own name",
        )  # fmt: skip
    if not allow_pickle:
        raise UnsupportedError(
            "is a pickle, which can hold a program instead of tensors",
            path=folder.path / PICKLE_NAME,
            hint="if you trust where it comes from, run loraformat convert on it with "
            "--allow-pickle (which loads tensors only), or save it again with "
            "safe_serialization=True",
        )
    return _unpickle(folder)


def _open_files(
    folder: SafeDirectory, name: str, shards: dict[str, set[str] | None]
) -> StoredTensors:
    found = StoredTensors(folder.path / name, {}, verbatim=name == WEIGHTS_NAME)
    with contextlib.ExitStack() as opened:
        for shard, wanted in shards.items():
            file = MappedFile(folder, shard, foreign=True)
            opened.callback(file.close)
            entries = file.header.entries
            if wanted is not None and wanted != set(entries):
                odd = sorted(wanted ^ set(entries))[0]
                raise InputError(
                    f"tensor {printable(odd)} is in the index or in {shard}, but not in both",
                    path=found.path,
                )
            for key, entry in entries.items():
                load = partial(file.view, key)
                stored = DenseTensor(key, entry.dtype, entry.shape, load, file.releaser(key))
                found.tensors[key] = checked(stored, file.path)
            found.metadata |= file.header.metadata
        found.close = opened.pop_all().close
    return found


def checked(tensor: DenseTensor, path: Path) -> DenseTensor:
    """Return a tensor that is checked for NaN when loaded; 8-bit floats become float32.

    Raises
    ------
    UnsupportedError
        If it holds no floating-point numbers.
    """
    if tensor.dtype not in _FLOATS + _EIGHT_BITS:
        raise UnsupportedError(
            f"tensor {printable(tensor.name)} of type {tensor.dtype} is not part of a LoRA adapter",
            path=path,
            hint="its method cannot be read as a low-rank delta; merge it with PEFT",
        )
    dtype = "F32" if tensor.dtype in _EIGHT_BITS else tensor.dtype

    def load() -> memoryview:
        values = array_view(tensor.load(), tensor.dtype).astype(numpy_dtype(dtype), copy=False)
        check_finite(values, tensor.name, path)
        return array_bytes(values)

    return DenseTensor(tensor.name, dtype, tensor.shape, load, tensor.release)


def _unpickle(folder: SafeDirectory) -> StoredTensors:
    path = folder.path / PICKLE_NAME
    file = open_pickle(folder, PICKLE_NAME)
    tensors = {name: checked(tensor, path) for name, tensor in file.tensors.items()}
    return StoredTensors(path, tensors, verbatim=False, close=file.close)
