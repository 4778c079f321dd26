"""``model.safetensors.index.json``: which shard holds which stored tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from os import PathLike

from loraformat.errors import FormatError, printable
from loraformat.storage import foreign_json, strict_json
from loraformat.tensors.header import is_clean_name

__all__ = ["INDEX_NAME", "MAX_INDEX_BYTES", "check_homes", "encode_index", "parse_index"]

INDEX_NAME = "model.safetensors.index.json"
#: Longest index that is read (bytes).
MAX_INDEX_BYTES = 64 << 20

_SHARD_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,200}", re.ASCII)


def encode_index(weight_map: Mapping[str, str], total_bytes: int) -> bytes:
    """Return the index as transformers writes it.

    It maps each stored tensor to its shard, and has the sum of the sizes of all stored tensors.
    """
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def parse_index(
    raw: bytes, path: str | PathLike[str], *, strict: bool = False, suffix: str = ".safetensors"
) -> tuple[dict[str, str], int | None]:
    """Return the weight map, and the total size if the index has it.

    Parameters
    ----------
    strict : bool, optional
        As in a bundle; otherwise the index is another program's, and read as that reads it.
    suffix : str, optional
        Of the shards' names.

    Raises
    ------
    FormatError
        B03 (not the JSON it must be) or B04 (a name that is no tensor's or no shard's).

    Examples
    --------
    >>> parse_index(b'{"weight_map": {"w": "../../etc/x.safetensors"}}', "index.json")
    Traceback (most recent call last):
    loraformat.errors.FormatError: index.json: shard name ../../etc/x.safetensors is not ...
    """
    try:
        index = strict_json.loads(raw) if strict else foreign_json.loads(raw)
    except strict_json.StrictJsonError as error:
        raise FormatError("B03", f"not strict JSON: {error}", path=path) from None
    except foreign_json.ForeignJsonError as error:
        raise FormatError("B03", f"not JSON: {error}", path=path) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise FormatError("B03", "is not an object with a weight_map", path=path)
    if not all(map(is_clean_name, weight_map)):
        raise FormatError("B04", "has a tensor name in weight_map that is not clean", path=path)
    for shard in weight_map.values():
        bare = isinstance(shard, str) and shard.endswith(suffix)
        if not bare or not _SHARD_NAME.fullmatch(shard.removesuffix(suffix)):
            raise FormatError(
                "B04",
                f"shard name {printable(shard)} is not a bare {suffix} file name",
                path=path,
                hint="do not use this checkpoint unless you trust its source",
            )
    metadata = index.get("metadata", {})
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return weight_map, total if type(total) is int else None


def check_homes(
    weight_map: dict[str, str], homes: dict[str, str], path: str | PathLike[str]
) -> None:
    """Refuse an index that puts a tensor into another file than its home (B03)."""
    for name, shard in weight_map.items():
        if homes.get(name) != shard:
            raise FormatError(
                "B03",
                f"puts tensor {printable(name)} into {shard}, which does not hold it",
                path=path,
                hint="the shards belong to another index; download the checkpoint again",
            )
