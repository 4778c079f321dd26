"""Make the test vectors in ``spec/vectors``: every byte, from the builders beside this file.

    python tools/make_vectors.py             write them
    python tools/make_vectors.py --check     fail if what is there differs

The builders know the format but not the package. Only the standard library is used,
and the result does not depend on machine or version.
"""

from __future__ import annotations

import argparse
import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import vector_invalid
import vector_nf4 as nf4
import vector_undo
import vector_undo_invalid
import vector_undo_valid
import vector_valid
from vector_bundle import Draft, build, text

ROOT = Path(__file__).parents[1] / "spec" / "vectors"

Json = dict[str, Any]


def expected(draft: Draft, files: dict[str, bytes]) -> Json:
    """Return what a reader must find in a valid bundle."""
    tensors: Json = {}
    for name, values in draft.values.items():
        dtype = draft.records[name]["dtype"]
        tensors[name] = {
            "shape": draft.records[name]["shape"],
            "dtype": dtype,
            "float32_sha256": sha256(nf4.pack(values, "F32")).hexdigest(),
            "float32_first": [f"{bits:08x}" for bits in nf4.bits(values[:8])],
            "dtype_sha256": sha256(nf4.pack(values, dtype)).hexdigest(),
            "dtype_first": nf4.pack(values[:8], dtype).hex(),
        }
    manifest = json.loads(files["loraformat.json"])
    return {"fingerprint": manifest["fingerprint"], "dequantized": tensors}


def make() -> dict[str, bytes]:
    """Return every file of the vectors' directory, by path."""
    out: dict[str, bytes] = {}
    index: Json = {
        "format_version": "1.1",
        "made_by": "tools/make_vectors.py",
        "valid": [],
        "invalid": [],
    }
    for name, how, draft in vector_valid.valid():
        files = build(draft)
        out |= {f"valid/{name}/{path}": data for path, data in files.items()}
        entry = {"name": name, "how": how, **expected(draft, files), "files": hashes(files)}
        index["valid"].append(entry)
    for name, rule, reason, how, draft in vector_invalid.invalid():
        files = build(draft)
        out |= {f"invalid/{name}/{path}": data for path, data in files.items()}
        index["invalid"].append(
            {"name": name, "rule": rule, "reason": reason, "how": how, "files": hashes(files)}
        )
    out["index.json"] = text(index)
    return out | {f"undo/{path}": data for path, data in make_undo().items()}


def make_undo() -> dict[str, bytes]:
    """Return every file of the undo records' vectors, by path."""
    out: dict[str, bytes] = {}
    index: Json = {"version": "1.0", "made_by": "tools/make_vectors.py", "valid": [], "invalid": []}
    for name, how, draft in vector_undo_valid.valid():
        files = vector_undo.build(draft)
        out |= {f"valid/{name}/{path}": data for path, data in files.items()}
        entry = {"name": name, "how": how, **vector_undo.expected(draft), "files": hashes(files)}
        index["valid"].append(entry)
    for name, rule, reason, draft in vector_undo_invalid.invalid():
        files = vector_undo.build(draft)
        out |= {f"invalid/{name}/{path}": data for path, data in files.items()}
        index["invalid"].append(
            {"name": name, "rule": rule, "reason": reason, "files": hashes(files)}
        )
    out["index.json"] = text(index)
    return out


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    """Return the SHA-256 of each file."""
    return {path: sha256(data).hexdigest() for path, data in sorted(files.items())}


def present() -> dict[str, bytes]:
    """Return the files that lie in the vectors' directory now."""
    return {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in ROOT.rglob("*") if p.is_file()}


def main() -> int:
    """Write or check; return the exit code."""
    parser = argparse.ArgumentParser(description="Make the test vectors of the specification.")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    arguments = parser.parse_args()
    wanted, found = make(), present()
    different = sorted(p for p in wanted.keys() | found.keys() if wanted.get(p) != found.get(p))
    if arguments.check:
        for path in different:
            print(
                f"spec/vectors/{path}: differs from what tools/make_vectors.py makes",
                file=sys.stderr,
            )
        return 1 if different else 0
    for path in different:
        if path not in wanted:
            (ROOT / path).unlink()
            continue
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_bytes(wanted[path])
    print(f"{len(wanted)} files, {sum(map(len, wanted.values()))} bytes, {len(different)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
