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
from loraformat.shards.index_json import MAX_INDEX_BYTES, parse_index
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
    """Contents of the weight files, by stored name."""

    #: The file to name in messages.
    path: Path
    tensors: dict[str, DenseTensor]
    metadata: dict[str, str] = field(default_factory=dict)
    #: PEFT reads them as they are.
    verbatim: bool = True
    close: Callable[[], None] = lambda: None


def open_tensors(folder: SafeDirectory, *, allow_pickle: bool) -> StoredTensors:
    """Open the weight files; safetensors is preferred to pickle, as in PEFT."""
    if folder.has(WEIGHTS_NAME):
        return _open_files(folder, WEIGHTS_NAME, None)
    if folder.has(INDEX_NAME):
        raw = folder.read(INDEX_NAME, MAX_INDEX_BYTES)
        return _open_files(folder, INDEX_NAME, parse_index(raw, folder.path / INDEX_NAME)[0])
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
    path, file = folder.path / PICKLE_NAME, open_pickle(folder, PICKLE_NAME)
    tensors = {name: _checked(tensor, path) for name, tensor in file.tensors.items()}
    return StoredTensors(path, tensors, verbatim=False, close=file.close)


def _open_files(
    folder: SafeDirectory, name: str, weight_map: dict[str, str] | None
) -> StoredTensors:
    found = StoredTensors(folder.path / name, {}, verbatim=name == WEIGHTS_NAME)
    indexed = set((weight_map or {}).items())
    with contextlib.ExitStack() as opened:
        for shard in [name] if weight_map is None else dict.fromkeys(weight_map.values()):
            file = MappedFile(folder, shard, foreign=True)
            opened.callback(file.close)
            for key, entry in file.header.entries.items():
                indexed ^= {(key, shard)}
                load = partial(file.view, key)
                stored = DenseTensor(key, entry.dtype, entry.shape, load, file.releaser(key))
                found.tensors[key] = _checked(stored, file.path)
            found.metadata |= file.header.metadata
        if weight_map is not None and indexed:
            odd, shard = min(indexed)
            raise InputError(
                f"tensor {printable(odd)} is in the index or in {shard}, but not in both",
                path=found.path,
            )
        found.close = opened.pop_all().close
    return found


def _checked(tensor: DenseTensor, path: Path) -> DenseTensor:
    """Return a tensor that is checked for NaN when loaded; 8-bit floats become float32."""
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
