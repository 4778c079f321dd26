"""A complete reader of undo records 1.0 that needs only Python: verifies one and undoes the merge.

Written from undo-1.0.md alone, where each rule id below is explained. Slow: for small models.
Usage: python miniundo.py DIRECTORY [OUT], a directory as in section 5 of that text; names the
broken rule and exits with 4, or succeeds and writes each restored tensor's bytes into OUT.
"""

# fmt: off
import math
import re
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from minireader import BYTES, HEX, Broken, ints, is_name, is_text, need, read_header, sha, strict

RECORD = {"version", "formula", "created_by", "tile_elements", "adapters", "tensors", "unchanged",
          "config"}
ENTRY = {"mode", "dtype", "shape", "sha256", "merged_sha256", "terms", "rows"}
TERM = {"adapter", "target", "weight", "part", "block", "expert", "rows"}
FLOATS = {"F32": ("f", 0x7F800000), "F16": ("e", 0x7C00), "BF16": ("f", 0x7F80)}
MODES = {"interval": (".residual", ".zeros", ".gains", ".lengths"), "raw": (".residual",),
         "rows": (".residual",), "new": ()}

def members(value, names, newer):
    need("U03", type(value) is dict and names <= set(value), names)
    need("U03", newer or names == set(value), f"more than {names}")

def is_number(x):
    return type(x) in (int, float) and math.isfinite(x)

def read_record(meta):
    need("U01", "loraformat.undo" in meta)
    r = strict(meta["loraformat.undo"].encode(), "U02", "the record")
    need("U02", type(r) is dict and is_text(r.get("version"), r"1\.(0|[1-9][0-9]{0,5})"))
    need("U02", r.get("formula") == "fixed-point-1", "formula")
    newer = r["version"] != "1.0"
    members(r, RECORD, newer)
    need("U03", type(r["created_by"]) is str and type(r["config"]) in (str, type(None)), "text")
    need("U03", ints([r["tile_elements"]], 1 << 31, 1, 1), "tile_elements")
    need("U03", type(r["adapters"]) is list, "adapters")
    for a in r["adapters"]:
        members(a, {"path", "sha256", "weight"}, newer)
        need("U03", type(a["path"]) is str and is_text(a["sha256"], HEX), "an adapter")
        need("U03", is_number(a["weight"]), "an adapter's weight")
    for names in (r["tensors"], r["unchanged"]):
        need("U03", type(names) is dict and all(map(is_name, names)), "names")
    need("U03", not set(r["tensors"]) & set(r["unchanged"]), "a name twice")
    need("U03", all(is_text(digest, HEX) for digest in r["unchanged"].values()), "unchanged")
    for name, t in r["tensors"].items():
        members(t, ENTRY, newer)
        mode = t["mode"]
        need("U03", type(mode) is str and mode in MODES, f"mode of {name}")
        need("U03", ints(t["shape"], 1 << 48) and is_text(t["merged_sha256"], HEX), name)
        if mode == "new":
            need("U03", (t["dtype"], t["shape"], t["sha256"]) == ("", [], ""), name)
        else:
            need("U03", t["dtype"] in list(BYTES) and is_text(t["sha256"], HEX), name)
        need("U03", mode != "interval" or (t["dtype"] in FLOATS and len(t["shape"]) <= 3), name)
        need("U03", mode != "rows" or t["shape"], f"rows of {name}")
        many = t["shape"][0] if mode == "rows" else 0
        need("U03", ints(t["rows"], many, many) and t["rows"] == sorted(set(t["rows"])), name)
        need("U03", type(t["terms"]) is list and (mode == "interval" or not t["terms"]), name)
        for term in t["terms"]:
            members(term, TERM, newer)
            need("U03", is_number(term["weight"]) and type(term["target"]) is str, "a term")
            need("U03", term["part"] in ("delta", "bias"), "the part of a term")
            need("U03", ints([term["adapter"], term["block"]], 1 << 31), "a term")
            need("U03", term["expert"] is None or ints([term["expert"]], 1 << 31), "an expert")
            rows = term["rows"]
            need("U03", rows is None or (ints(rows, 1 << 31, 2) and len(rows) == 2), "rows")
    return r

def geometry(t, elements):
    rows, columns = [1, 1, *t["shape"]][-2:]
    step = max(1, elements // max(columns, 1))
    return t["shape"][0] if len(t["shape"]) == 3 else 1, rows, columns, step

def check_parts(r, parts):
    known = {name + part for name, t in r["tensors"].items() for part in MODES[t["mode"]]}
    need("U09", set(parts) <= known, set(parts) - known)
    need("U09", all(p["dtype"] == "U8" and len(p["shape"]) == 1 for p in parts.values()), "bytes")
    for name, t in r["tensors"].items():
        sizes = {part: len(piece(parts, name, part)) for part in MODES[t["mode"]]}
        if t["mode"] == "interval":
            stack, rows, _, step = geometry(t, r["tile_elements"])
            need("U09", sizes[".lengths"] == 8 * stack * -(-rows // step), name)
            need("U09", sizes[".zeros"] % 8 == sizes[".gains"] % 4 == 0, name)
            lengths = numbers(piece(parts, name, ".lengths"), "q")
            need("U09", min(lengths, default=0) >= 0 and sum(lengths) == sizes[".residual"], name)
        elif t["mode"] != "new":
            shape = [len(t["rows"]), *t["shape"][1:]] if t["mode"] == "rows" else t["shape"]
            need("U09", sizes[".residual"] == BYTES[t["dtype"]] * math.prod(shape), name)

def piece(parts, name, part):
    return bytes(parts[name + part]["data"]) if name + part in parts else b""

def numbers(data, letter):
    return struct.unpack(f"<{len(data) // struct.calcsize(letter)}{letter}", data)

def floats(data, dtype):
    if dtype == "BF16":
        data = b"".join(b"\0\0" + data[i:i + 2] for i in range(0, len(data), 2))
    return numbers(data, {"F64": "d"}.get(dtype) or FLOATS[dtype][0])

def f32(x):
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)

def number(x, dtype):  # of x, a float32, rounded to the dtype
    if dtype == "F16":
        u = int.from_bytes(struct.pack("<e", abs(x)), "little")
    else:
        u = int.from_bytes(struct.pack("<f", abs(x)), "little")
        u = u if dtype == "F32" else u + 0x7FFF + (u >> 16 & 1) >> 16
    return -u if math.copysign(1, x) < 0 else u

def to_bytes(n, dtype):
    size = BYTES[dtype]
    return (abs(n) | (n < 0) << 8 * size - 1).to_bytes(size, "little")

def read_adapter(path):
    tensors, meta, _, _ = read_header(path, profile=False)
    digest, deltas = b"", {}
    for target in sorted(meta):
        delta = strict(meta[target].encode(), "U05", target)
        digest += f"{target}\0{delta['scaling']!r}\0{delta['orientation']}\0".encode()
        for leaf in ("a", "b", "magnitude", "bias"):
            t = tensors.get(f"{target}.{leaf}")
            known = t and f"{t['dtype']}\0{t['shape']}\0".encode() + bytes(t["data"])
            digest += known or b"none\0"
            delta[leaf] = t and nested(floats(bytes(t["data"]), t["dtype"]), t["shape"])
        deltas[target] = delta
    return sha(digest), deltas

def nested(flat, shape):
    if len(shape) < 2:
        return list(flat)
    step = math.prod(shape[1:])
    return [nested(flat[i * step:(i + 1) * step], shape[1:]) for i in range(shape[0])]

def factors(term, adapters, stack):
    need("U10", term["adapter"] < len(adapters) and term["block"] < stack, "adapter or block")
    delta = adapters[term["adapter"]].get(term["target"])
    need("U10", delta is not None, term["target"])
    if term["part"] == "bias":
        need("U10", delta["bias"] is not None, "bias")
        return [[1.0]], [delta["bias"]], delta["scaling"], False, False
    a, b, expert, gained = delta["a"], delta["b"], term["expert"], delta["magnitude"] is not None
    need("U10", (expert is not None) == (type(a[0][0]) is list), "expert")
    if expert is not None:
        need("U10", expert < len(a), "expert")
        a, b = a[expert], b[expert]
    first, last = term["rows"] or (0, len(b))
    need("U10", first <= last <= len(b), "rows")
    return b[first:last], a, delta["scaling"], gained, delta["orientation"] == "transposed"

def exponent(v):
    e = max(math.frexp(max(map(abs, v), default=0.0))[1], -400)
    need("U10", e <= 400, "beyond 2^400")
    return e

def fixed(vectors, bits):  # integers, and the exponent of their unit
    steps = [exponent(v) - bits for v in vectors]
    return [([round(x * 2.0 ** -s) for x in v], s) for v, s in zip(vectors, steps)]

def delta_of(terms, made, gains, shape):  # the delta by rows, and the gains by row or column
    turned = {m[4] for m in made}
    need("U10", len(turned) == 1, "orientations")
    turned, count = turned.pop(), len(made[0][0])
    for b, a, *_ in made:
        need("U10", (len(b), len(a[0])) == (shape[::-1] if turned else shape), "shapes")
    own = [[gains.pop(0) for _ in b] if gained else None for b, _, _, gained, _ in made]
    total, gained = [1.0] * count, [g for g in own if g]
    for term, g in zip(terms, own):
        if g:
            alone = len(gained) == 1 and term["weight"] == 1
            total = g if alone else [t + term["weight"] * (x - 1) for t, x in zip(total, g)]
    total = [f32(t) for t in total]
    left = [[x * (term["weight"] * s * (g[j] if g else 1.0) / (total[j] or math.inf))
             for term, (b, _, s, _, _), g in zip(terms, made, own) for x in b[j]]
            for j in range(count)]
    right = [row for _, a, *_ in made for row in a]
    if turned:
        left, right = [list(c) for c in zip(*right)], [list(c) for c in zip(*left)]
    shifts = [(exponent(c) - exponent(row)) // 2 for c, row in zip(zip(*left), right)]
    left = [[x * 2.0 ** -t for x, t in zip(row, shifts)] for row in left]
    right = [[x * 2.0 ** t for x in row] for row, t in zip(right, shifts)]
    bits = (53 - (len(right) - 1).bit_length()) // 2
    columns = fixed(list(zip(*right)), bits)
    return ([[f32(sum(map(int.__mul__, u, v)) * 2.0 ** (s + t)) for v, t in columns]
             for u, s in fixed(left, bits)], total if gained else None, turned)

def interval(m, d, g, source, target):  # first and last number
    need("U08", all(map(math.isfinite, (m, d, 1 if g is None else g))), "not finite")
    if g is not None and g < 0:
        m, g = -m, -g
    wanted, top = number(m, target), FLOATS[source][1] - 1
    def merged(n):
        x = f32(floats(to_bytes(n, source), source)[0] + d)
        x = x if g is None else f32(x * g) if g else 0.0
        return number(max(-65504.0, min(65504.0, x)) if target == "F16" else x, target)
    ends = []
    for beyond in (wanted, wanted + 1):  # the least number that merges into this or more
        low, high = -top, top + 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if merged(middle) >= beyond else (middle + 1, high)
        ends.append(low)
    need("U08", ends[0] < ends[1], "no interval")
    return ends[0], ends[1] - 1

def decode(code, operands, source, target):
    bits, used, found = int.from_bytes(code, "little"), 0, []
    for m, d, g in operands:
        a, b = interval(m, d, g, source, target)
        width = (b - a).bit_length()
        found.append(a + (bits >> used & (1 << width) - 1))
        used += width
        need("U08", found[-1] <= b, "rank")
    need("U08", len(code) == (used + 7) // 8 and bits >> used == 0, "length")
    return found

def restore(name, t, merged, r, parts, adapters):
    data, residual = bytes(merged["data"]), piece(parts, name, ".residual")
    if t["mode"] == "raw":
        return residual
    if t["mode"] == "rows":
        width = len(data) // t["shape"][0]
        whole = [data[i * width:(i + 1) * width] for i in range(t["shape"][0])]
        for i, row in enumerate(t["rows"]):
            whole[row] = residual[i * width:(i + 1) * width]
        return b"".join(whole)
    stack, rows, columns, step = geometry(t, r["tile_elements"])
    made = [(term, factors(term, adapters, stack)) for term in t["terms"]]
    same = ("adapter", "target", "part", "block", "expert")
    need("U10", len({tuple(term[k] for k in same) for term in t["terms"]}) == len(made), "twice")
    gains = list(numbers(piece(parts, name, ".gains"), "f"))
    need("U09", len(gains) == sum(len(f[0]) for _, f in made if f[3]), f"gains of {name}")
    lengths = list(numbers(piece(parts, name, ".lengths"), "q"))
    values = floats(data, merged["dtype"])
    found = []
    for block in range(stack):
        own = [(term, f) for term, f in made if term["block"] == block]
        delta, g, turned = [[0.0] * columns] * rows, None, False
        if own:
            delta, g, turned = delta_of(*zip(*own), gains, (rows, columns))
        operands = [(values[(block * rows + i) * columns + j], delta[i][j],
                     None if g is None else g[j if turned else i])
                    for i in range(rows) for j in range(columns)]
        for start in range(0, rows, step):
            size, some = lengths.pop(0), operands[start * columns:(start + step) * columns]
            found += decode(residual[:size], some, t["dtype"], merged["dtype"])
            residual = residual[size:]
    whole = [to_bytes(n, t["dtype"]) for n in found]
    zeros = numbers(piece(parts, name, ".zeros"), "q")
    need("U11", all(a < b for a, b in zip((-1, *zeros), (*zeros, len(whole)))), f"zeros of {name}")
    for i in zeros:
        whole[i] = whole[i][:-1] + bytes([whole[i][-1] | 0x80])
    return b"".join(whole)

def undo(folder):
    """Return each original tensor's bytes by name, or raise Broken."""
    parts, meta, _, _ = read_header(folder / "undo.lfu", profile=False)
    r = read_record(meta)
    check_parts(r, parts)
    merged = read_header(folder / "merged.safetensors", profile=False)[0]
    need("U04", {*r["tensors"], *r["unchanged"]} == set(merged), "names")
    for name, t in r["tensors"].items():
        if t["mode"] in ("interval", "rows"):
            need("U04", merged[name]["shape"] == t["shape"], name)
            allowed = list(FLOATS) if t["mode"] == "interval" else [t["dtype"]]
            need("U04", merged[name]["dtype"] in allowed, name)
    adapters = []
    if any(t["terms"] for t in r["tensors"].values()):
        for i, a in enumerate(r["adapters"]):
            digest, deltas = read_adapter(folder / f"adapter-{i}.safetensors")
            need("U05", digest == a["sha256"], a["path"])
            adapters.append(deltas)
    restored = {}
    for name, m in merged.items():
        t = r["tensors"].get(name)
        need("U06", sha(m["data"]) == (t["merged_sha256"] if t else r["unchanged"][name]), name)
        if t is None or t["mode"] != "new":
            restored[name] = restore(name, t, m, r, parts, adapters) if t else bytes(m["data"])
            need("U07", t is None or sha(restored[name]) == t["sha256"], name)
    return restored

def main(folder, out=None):
    try:
        restored = undo(Path(folder))
    except Broken as broken:
        print(broken, file=sys.stderr)
        return 4
    for name, data in restored.items():
        print(sha(data), name)
        if out and re.fullmatch(r"[\w.-]+", name):
            (Path(out) / name).write_bytes(data)
    return 0

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
