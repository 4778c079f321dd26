"""Small bundles to spoil, and what the package makes of them."""

from __future__ import annotations

import json
import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from loraformat.bundle.integrity import verify_bundle
from loraformat.bundle.reader import open_bundle
from loraformat.errors import FormatError, InputError
from loraformat.model.checkpoint import NF4Tensor
from loraformat.model.nf4_parts import NF4Parts

ROOT = Path(__file__).parents[2]
VALID = ROOT / "spec" / "vectors" / "valid"
SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "loraformat.json"
STATE = ".quant_state.bitsandbytes__nf4"

sys.path.insert(0, str(ROOT / "spec"))

import minireader  # noqa: E402

Content = dict[str, tuple[Any, ...]]


def read(path: Path) -> dict[str, bytes]:
    """Return the files of a bundle by path."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def put(path: Path, data: bytes | bytearray) -> None:
    """Overwrite a file in place; emptying it first makes some file systems write it to disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.truncate()


def write(path: Path, files: dict[str, bytes]) -> Path:
    """Write files below a directory."""
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def refusal(path: Path) -> str | None:
    """Return why a bundle is refused, None if it is accepted; any other exception escapes."""
    try:
        findings = verify_bundle(path)
    except FormatError as error:
        raise AssertionError(f"verify_bundle raised {error} instead of returning it") from error
    except InputError as error:
        assert error.path, f"no file named: {error}"
        return f"--- {error}"
    return f"{findings[0].rule} {findings[0].path}: {findings[0].problem}" if findings else None


def minireader_accepts(path: Path) -> bool:
    """Tell whether the minireader accepts a bundle."""
    try:
        minireader.verify(path)
    except (minireader.Broken, OSError):
        return False
    return True


def content(path: Path) -> Content:
    """Return everything that an accepted bundle computes with."""
    with open_bundle(path) as bundle:
        found: Content = {
            name: (tensor.dtype, tensor.shape, *_details(tensor), *_bytes(tensor.load()))
            for name, tensor in bundle.tensors.items()
        }
        found["config.json"] = (bundle.checkpoint.config, bundle.checkpoint.quantization_config)
    return found


def fingerprint(path: Path) -> str:
    """Return the fingerprint of an accepted bundle."""
    with open_bundle(path) as bundle:
        return bundle.manifest.fingerprint


def _details(tensor: Any) -> tuple[Any, ...]:
    if not isinstance(tensor, NF4Tensor):
        return ()
    return tensor.block_size, tensor.double_quant, tensor.transposed


def _bytes(loaded: memoryview | NF4Parts) -> tuple[bytes, ...]:
    if isinstance(loaded, NF4Parts):
        return tuple(bytes(view) for view in loaded.by_suffix().values())
    return (bytes(loaded),)


def split(shard: bytes) -> tuple[dict[str, Any], bytes]:
    """Return a shard's header as JSON, and its data."""
    start = 8 + int.from_bytes(shard[:8], "little")
    return json.loads(shard[8:start]), shard[start:]


def join(header: Any, data: bytes, alignment: int = 4096) -> bytes:
    """Return a shard from a header and its data."""
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw = raw.ljust(-(-(len(raw) + 8) // alignment) * alignment - 8)
    return len(raw).to_bytes(8, "little") + raw + data


def repair(files: dict[str, bytes]) -> dict[str, bytes]:
    """Recompute every length, digest, fingerprint and total that can be recomputed."""
    files, manifest = dict(files), json.loads(files[MANIFEST])
    stored: dict[str, bytes] = {}
    for shard in manifest["shards"]:
        data = files[shard["file"]]
        header, body = split(data)
        start = len(data) - len(body)
        shard |= {"bytes": len(data), "header_sha256": sha256(data[:start]).hexdigest()}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                stored[name] = body[begin:end]
    for name, record in manifest["tensors"].items():
        if record["encoding"] == "nf4":
            parts = [stored.get(name + suffix, b"") for suffix in ("", *minireader.PARTS)]
            data = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        else:
            data = stored[name]
        record["sha256"] = sha256(data).hexdigest()
    for folder, records in [
        ("", manifest["files"]),
        *(
            (f"adapters/{name}/", adapter["files"])
            for name, adapter in manifest["adapters"].items()
        ),
    ]:
        for path, record in records.items():
            data = files[folder + path]
            record |= {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    index = json.loads(files[INDEX])
    index["metadata"]["total_size"] = sum(map(len, stored.values()))
    files[INDEX] = json.dumps(index).encode()
    manifest["fingerprint"] = minireader.fingerprint(manifest["tensors"])
    files[MANIFEST] = json.dumps(manifest).encode()
    return files
