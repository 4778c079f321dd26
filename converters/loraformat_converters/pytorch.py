"""``pytorch_model.bin`` checkpoints: pickled weights, single or sharded.

What transformers saved before safetensors. A pickle can hold a program, so that it is read on
request only (``--allow-pickle``), and then by a loader that makes nothing but tensors.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from loraformat.errors import FormatError, InputError, UnsupportedError, printable
from loraformat.model.checkpoint import Checkpoint, LazyTensor
from loraformat.model.packed_weights import refuse_packed
from loraformat.model.pickled import open_pickle
from loraformat.model.tied_head import HEAD
from loraformat.plugins import BaseFormat, ReadOptions
from loraformat.shards.index_json import MAX_INDEX_BYTES, check_homes, parse_index
from loraformat.shards.read_directory import as_checkpoint
from loraformat.storage.safe_directory import SafeDirectory

__all__ = ["CONVERTER", "read", "sniff"]

_SINGLE = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"


def sniff(path: Path) -> bool:
    """Tell whether a directory holds ``pytorch_model.bin``, or its index, and no safetensors."""
    named = path.is_dir() and any((path / name).is_file() for name in (_SINGLE, _INDEX))
    return named and not any(path.glob("*.safetensors"))


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Open pickled weights, which are dense and tensors alone, if ``options.allow_pickle``."""
    folder = SafeDirectory(path)
    weight_map = None
    if folder.has(_INDEX):
        raw = folder.read(_INDEX, MAX_INDEX_BYTES)
        weight_map, _ = parse_index(raw, path / _INDEX, suffix=".bin")
    names = [_SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    if not options.allow_pickle:
        raise UnsupportedError(
            "is a pickle, which can hold a program instead of tensors",
            path=path / names[0],
            hint="if you trust where it comes from: loraformat convert "
            f"{printable(path)} DENSE --to safetensors --allow-pickle, which loads tensors only",
        )
    tensors: dict[str, LazyTensor] = {}
    homes: dict[str, str] = {}
    with contextlib.ExitStack() as opened:
        for name in names:
            if not folder.has(name):
                raise InputError(
                    "is missing",
                    path=folder.path / name,
                    hint="the download is incomplete; download it again",
                )
            file = open_pickle(folder, name)
            opened.callback(file.close)
            for key, tensor in file.tensors.items():
                if key in homes:
                    raise FormatError(
                        "H10",
                        f"tensor {printable(key)} stands in {homes[key]} too",
                        path=path / name,
                    )
                homes[key] = name
                # The head's pickle names the embedding's own numbers: transformers ties them.
                if not (key == HEAD and key in file.same):
                    tensors[key] = tensor
        if weight_map is not None:
            check_homes(weight_map, homes, path / _INDEX)
            names.append(_INDEX)
        checkpoint = as_checkpoint(path, "pytorch", names, tensors, opened.close)
        settings = checkpoint.quantization_config
        refuse_packed(path, tensors, settings and settings.get("quant_method"))
        checkpoint.close = opened.pop_all().close
    return checkpoint


CONVERTER = BaseFormat(
    name="pytorch",
    summary="pytorch_model.bin: pickled weights, one file or sharded; with --allow-pickle",
    sniff=sniff,
    read=read,
)
