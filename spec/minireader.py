"""A complete reader of loraformat 1.1 that needs only Python: verifies a bundle, decodes a tensor.

Written from loraformat-1.1.md alone, where each rule id below is explained.
Usage: python minireader.py BUNDLE [TENSOR]; names the broken rule and exits with 4, or succeeds.
"""

# fmt: off
import hashlib
import json
import math
import re
import struct
import sys
from pathlib import Path

BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
         "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
PARTS = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map",
         ".quant_state.bitsandbytes__nf4")
ABSMAX, NESTED, MAP, NESTED_MAP, STATE = PARTS
OFFSET, SEGMENTS = ".nested_offset", "pypi.org/project/loraformat/segments"
METHOD = "loraformat (import loraformat.transformers)"
TABLES = {MAP: "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a",
          NESTED_MAP: "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"}
UNCLEAN = "\0-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
TEXT, NAME, HEX = f"[^{UNCLEAN}]{{0,1024}}", rf"[^{UNCLEAN}/\\]{{1,512}}", "[0-9a-f]{64}"
PART = (r"(?!(con|prn|aux|nul|(com|lpt)[0-9]) *(\.|$|/))[\w+@=,()\[\]-]"
        r"([\w.+@=,()\[\] -]{0,253}[\w+@=,()\[\]-])?")
PATH = f"(?ai)(?=.{{1,1024}}$){PART}(/{PART}){{0,7}}"
OWN = r"(?i)(loraformat\.json|model\.safetensors\.index\.json|adapters)(/.*)?|[^/]*\.safetensors"
TOP = ("format", "format_version", "created_by", "source", "fingerprint", "shard_limit", "shards",
       "tensors", "files", "adapters", "extensions")
DENSE = ("encoding", "dtype", "shape", "sha256")
NF4 = (*DENSE, "block_size", "double_quant", "transposed", "relative_rms_error")
INDEX = "model.safetensors.index.json"

class Broken(Exception):
    """A rule is broken."""

def need(rule, ok, what=""):
    if not ok:
        raise Broken(f"{rule} {what}")

def sha(data):
    return hashlib.sha256(data).hexdigest()

def strict(raw, rule, what, limit=1 << 27, carried=False):
    digits, levels = (4300, 128) if carried else (20, 32)
    def only(value, fine):
        return value if carried or fine else int("")  # int("") is a ValueError
    def deep(value):
        inner = value.values() if type(value) is dict else value if type(value) is list else None
        return 0 if inner is None else 1 + max(map(deep, inner), default=0)
    try:
        need(rule, len(raw) <= limit, f"{what} is too long")
        value = json.loads(raw.decode(), parse_constant=float if carried else int,
                           object_pairs_hook=lambda x: only(dict(x), len(dict(x)) == len(x)),
                           parse_int=lambda x: int(x if len(x) <= digits else ""),
                           parse_float=lambda x: only(float(x), math.isfinite(float(x))))
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        value = Broken
    need(rule, value is not Broken and deep(value) <= levels, f"{what} is not such JSON")
    return value

def is_text(value, pattern=TEXT):
    return type(value) is str and re.fullmatch(pattern, value) is not None

def is_name(value):
    return is_text(value, NAME) and len(value.encode()) <= 512

def ints(values, limit=1 << 53, longest=8, least=0):
    return type(values) is list and len(values) <= longest and all(
        type(n) is int and least <= n < limit for n in values)

def members(rule, value, names, newer, optional=()):
    need(rule, type(value) is dict and set(names) <= set(value), f"lacks one of {names}")
    need(rule, newer or set(value) <= {*names, *optional}, f"has more than {names}")

def read_header(path, profile=True):
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    need("H01", len(data) >= 8 and 10 <= start <= min(len(data), 8 + 100_000_000), path)
    raw, end = data[8:start], 0
    need("H02", raw[:1] == b"{" and raw.rstrip(b" ")[-1:] == b"}", path)
    header = strict(raw, "H03", path)
    meta = header.pop("__metadata__", {})
    need("H04", type(meta) is dict and all(type(v) is str for v in meta.values()), path)
    for name, e in header.items():
        need("H05", is_name(name), repr(name))
        need("H06", type(e) is dict and set(e) == {"dtype", "shape", "data_offsets"}, name)
        need("H06", e["dtype"] in list(BYTES) and ints(e["shape"], 1 << 48), name)
        span = e["data_offsets"]
        need("H06", ints(span, 1 << 63, 2) and len(span) == 2, name)
        need("H07", span[1] - span[0] == math.prod(e["shape"]) * BYTES[e["dtype"]], name)
        e["data"] = memoryview(data)[start + span[0]:start + span[1]]
    ordered = sorted(header, key=lambda name: header[name]["data_offsets"])
    for name in ordered:
        need("H08", header[name]["data_offsets"][0] == end, name)
        end = header[name]["data_offsets"][1]
    need("H09", start + end == len(data), path)
    need("L01", not profile or start % 4096 == 0, path)
    need("L02", not profile or ordered == list(header), path)
    return {name: header[name] for name in ordered}, meta, data[:start], len(data)

def read_files(files, newer, allowed=lambda path: True):
    need("M08", type(files) is dict, "files")
    need("M12", len({path.lower() for path in files}) == len(files), list(files))
    for path, record in files.items():
        need("M08", is_text(path, PATH) and allowed(path), path)
        members("M08", record, ("bytes", "sha256"), newer)
        need("M08", ints([record["bytes"]]), path)
        need("M06", is_text(record["sha256"], HEX), path)

def is_turned(t):
    return t["encoding"] == "nf4" and t["transposed"] is True

def fingerprint(tensors):
    lines = (f"{name}\t{t['encoding']}{'-transposed' if is_turned(t) else ''}\t{t['dtype']}\t"
             f"{','.join(map(str, t['shape']))}\t{t['sha256']}\n" for name, t in tensors.items())
    return sha(b"".join(sorted(line.encode() for line in lines)))

def read_manifest(raw):
    m = strict(raw, "M01", "the manifest", 1 << 26)
    need("M02", type(m) is dict and m.get("format") == "loraformat")
    need("M03", is_text(m.get("format_version"), r"1\.(0|[1-9][0-9]{0,5})"))
    minor = int(m["format_version"][2:])
    newer, more = minor > 1, ("segments",) * (minor > 0)
    members("M04", m, TOP, newer)
    need("M04", type(m["tensors"]) is dict, "tensors")
    for name, t in m["tensors"].items():
        nf4 = type(t) is dict and t.get("encoding") == "nf4"
        members("M05", t, NF4 if nf4 else DENSE, newer, more * nf4)
        need("M05", is_name(name) and (nf4 or t["encoding"] == "dense"), name)
        need("M05", t["dtype"] in list(TYPES.values() if nf4 else BYTES) and ints(t["shape"]), name)
        need("M06", is_text(t["sha256"], HEX), name)
        if nf4:
            error, flags = t["relative_rms_error"], (t["double_quant"], t["transposed"])
            need("M05", ints([t["block_size"]]) and all(type(flag) is bool for flag in flags), name)
            need("M05", not t["transposed"] or len(t["shape"]) == 2, name)
            need("M05", error is None or (type(error) in (int, float) and error >= 0), name)
            cut = minor > 0 and "segments" in t
            need("M05", not cut or (ints([t["segments"]], least=1) and not t["transposed"]), name)
    need("M10", m["fingerprint"] == fingerprint(m["tensors"]), "fingerprint")
    source = m["source"]
    need("M04", type(source) is dict and "format" in source, "source")
    need("M04", newer or set(source) <= {"format", "repo", "revision"}, "source")
    texts = [m["created_by"], *(source[k] for k in ("format", "repo", "revision") if k in source)]
    need("M04", all(map(is_text, texts)) and ints([m["shard_limit"]]), "created_by, shard_limit")
    need("M07", type(m["shards"]) is list and 1 <= len(m["shards"]) <= 99_999, "shards")
    for number, shard in enumerate(m["shards"], 1):
        members("M07", shard, ("file", "bytes", "header_sha256"), newer)
        name = f"model-{number:05}-of-{len(m['shards']):05}.safetensors"
        need("M07", shard["file"] == name, name)
        need("M07", ints([shard["bytes"]]), number)
        need("M06", is_text(shard["header_sha256"], HEX), number)
    read_files(m["files"], newer, lambda path: not re.fullmatch(OWN, path))
    need("M09", type(m["adapters"]) is dict, "adapters")
    need("M12", len({name.lower() for name in m["adapters"]}) == len(m["adapters"]), "adapters")
    for name, adapter in m["adapters"].items():
        need("M09", is_text(name, "[A-Za-z0-9][A-Za-z0-9._-]{0,95}") and is_text(name, PATH), name)
        members("M09", adapter, ("files",), newer)
        read_files(adapter["files"], newer)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            need("M09", file in adapter["files"], name)
    need("M11", type(m["extensions"]) is dict, "extensions")
    for name, extension in m["extensions"].items():
        need("M11", type(extension) is dict, name)
        need("M11", name == SEGMENTS or extension.get("must_understand") is False, name)
    cut = any(t["encoding"] == "nf4" and "segments" in t for t in m["tensors"].values())
    need("M13", cut == (SEGMENTS in m["extensions"]), SEGMENTS)
    need("M13", not cut or m["extensions"][SEGMENTS].get("must_understand") is True, SEGMENTS)
    return m

def read_state(entry, name):
    need("N05", entry["dtype"] == "U8" and 0 < len(entry["data"]) <= 4096, name)
    q = strict(bytes(entry["data"]), "N05", name)
    nested = ("nested_blocksize", "nested_dtype", "nested_offset")
    double, cut = (type(q) is dict and key in q for key in ("nested_dtype", "segments"))
    names = ("quant_type", "blocksize", "dtype", "shape", *("segments",) * cut)
    members("N05", q, (*names, *nested[:3 - cut] * double), False)
    need("N05", ints(q["shape"], 1 << 48, least=1), name)
    need("N05", not cut or ints([q["segments"]], 1 << 48, least=1), name)
    need("N06", q["quant_type"] == "nf4" and q["dtype"] in list(TYPES), name)
    need("N06", ints([q["blocksize"]]) and q["blocksize"] in [2**k for k in range(5, 13)], name)
    if double:
        need("N07", ints([q["nested_blocksize"]]) and q["nested_blocksize"] == 256, name)
        need("N07", q["nested_dtype"] == "float32", name)
    if double and not cut:
        offset = q["nested_offset"]
        need("N07", type(offset) in (int, float) and f32(offset) == offset, name)
    if cut:
        need("N09", len(q["shape"]) > 2 and math.prod(q["shape"][:-1]) % q["segments"] == 0, name)
        need("N09", q["segments"] % math.prod(q["shape"][:-2]) == 0, name)
    return {"encoding": "nf4", "dtype": TYPES[q["dtype"]], "shape": q["shape"],
            "block_size": q["blocksize"], "double_quant": double, "segments": q.get("segments"),
            "offsets": [q.get("nested_offset")]}

def read_weights(stored):
    """Group the stored tensors of one shard into weights, each with its parts' bytes."""
    weights = {}
    for owner in [name.removesuffix(STATE) for name in stored if name.endswith(STATE)]:
        w = read_state(stored[owner + STATE], owner)
        cut = [w["segments"]] if w["segments"] else []
        count = math.prod(w["shape"]) // (w["segments"] or 1)
        blocks = -(-count // w["block_size"])
        want = {"": ("U8", [*cut, (count + 1) // 2, *[1] * (not cut)]), MAP: ("F32", [16]),
                ABSMAX: ("U8" if w["double_quant"] else "F32", [*cut, blocks]),
                STATE: ("U8", [len(stored[owner + STATE]["data"])])}
        if w["double_quant"]:
            want |= {NESTED: ("F32", [*cut, -(-blocks // 256)]), NESTED_MAP: ("F32", [256])}
        if w["double_quant"] and cut:
            want[OFFSET] = ("F32", cut)
        found = {part: stored[owner + part] for part in ("", *PARTS, *[OFFSET] * len(cut))
                 if owner + part in stored}
        need("N01", set(found) == set(want), owner)
        for part, e in found.items():
            need("N03" if part else "N02", (e["dtype"], e["shape"]) == want[part], owner + part)
            need("N04", part not in TABLES or sha(e["data"]) == TABLES[part], owner + part)
        weights[owner] = w | {"count": count} | {suffix: e["data"] for suffix, e in found.items()}
        if OFFSET in found:
            weights[owner]["offsets"] = struct.unpack(f"<{cut[0]}f", found[OFFSET]["data"])
    parts = {owner + suffix for owner, w in weights.items() for suffix in (*PARTS, OFFSET)
             if suffix in PARTS or w["segments"]}
    for name in stored.keys() - parts - weights.keys():
        need("N01", not name.endswith(tuple(f".weight{suffix}" for suffix in PARTS)), name)
        weights[name] = {"encoding": "dense", **stored[name], "": stored[name]["data"]}
    return weights

def check_layout(shards, limit):
    last, homes, sizes = {}, {}, {}
    for number, stored in enumerate(shards):
        previous = tail = None
        for name, e in stored.items():
            behind = any(name.endswith(suffix) and name.removesuffix(suffix) + STATE in stored
                         for suffix in (MAP, NESTED_MAP, STATE))
            need("L03", behind or not tail, name)
            match = None if behind else re.match(r"(.*?)\.([0-9]{1,9})(?=\.|$)", name)
            layer, tail = match and (match[1], int(match[2])), behind
            if layer and layer != previous:
                need("L04", number not in homes.setdefault(layer, []), name)
                need("L05", layer[1] >= last.get(layer[0], 0), name)
                homes[layer].append(number)
                last[layer[0]] = layer[1]
            sizes[layer] = sizes.get(layer, 0) + len(e["data"])
            previous = layer
    for layer, places in homes.items():
        need("L06", len(places) == 1 or sizes[layer] > limit, layer)

def check_files(root, m, stored, quantized, cut):
    need("B03", (root / INDEX).is_file(), INDEX)
    index = strict((root / INDEX).read_bytes(), "B03", INDEX, 1 << 26)
    need("B03", type(index) is dict and type(index.get("weight_map")) is dict, INDEX)
    need("B04", index["weight_map"] == {name: file for name, (file, _) in stored.items()}, INDEX)
    total = index["metadata"].get("total_size") if type(index.get("metadata")) is dict else None
    need("B07", type(total) is int and total == sum(size for _, size in stored.values()), INDEX)
    need("B08", "config.json" in m["files"] or not (root / "config.json").is_file(), "config.json")
    listed = dict(m["files"])
    for name, adapter in m["adapters"].items():
        listed |= {f"adapters/{name}/{path}": record for path, record in adapter["files"].items()}
    for path, record in listed.items():
        need("B05", (root / path).is_file(), path)
        need("B05", (root / path).stat().st_size == record["bytes"], path)
        need("V03", sha((root / path).read_bytes()) == record["sha256"], path)
    if "config.json" in m["files"]:
        config = strict((root / "config.json").read_bytes(), "B06", "config.json", 1 << 24, True)
        need("B06", type(config) is dict, "config.json")
        need("B06", quantized == ("quantization_config" in config), "config.json")
        q = config.get("quantization_config", {})
        need("B06", type(q) is dict and (not quantized or (
            q.get("quant_method") == (METHOD if cut else "bitsandbytes")
            and q.get("load_in_4bit") is (None if cut else True)
            and q.get("bnb_4bit_quant_type") == "nf4")), "config.json")
    for name in m["adapters"]:
        config = (root / f"adapters/{name}/adapter_config.json").read_bytes()
        need("A02", type(strict(config, "A02", name, 1 << 20, True)) is dict, name)
        meta = read_header(root / f"adapters/{name}/adapter_model.safetensors", profile=False)[1]
        named = meta.get("loraformat.base_fingerprint", m["fingerprint"])
        need("A01", named == m["fingerprint"], f"{name} was made for {named}")

def verify(root):
    """Check every rule; return the manifest's tensors and the weights."""
    need("B01", (root / "loraformat.json").is_file(), root)
    m = read_manifest((root / "loraformat.json").read_bytes())
    present = {path.name for path in root.glob("*.safetensors")}
    need("B02", present == {shard["file"] for shard in m["shards"]}, root)
    shards, stored, weights = [], {}, {}
    for s in m["shards"]:
        entries, _, head, size = read_header(root / s["file"])
        need("B05", size == s["bytes"], s["file"])
        need("V02", sha(head) == s["header_sha256"], s["file"])
        need("H10", not stored.keys() & entries.keys(), s["file"])
        stored |= {name: (s["file"], len(e["data"])) for name, e in entries.items()}
        weights |= read_weights(entries)
        shards.append(entries)
    need("N08", weights.keys() == m["tensors"].keys(), "names")
    for name, t in m["tensors"].items():
        told = t | {"shape": t["shape"][::-1] if is_turned(t) else t["shape"]}
        shared = DENSE[:3] if t["encoding"] == "dense" else (*DENSE[:3], *NF4[4:6], "segments")
        need("N08", all(told.get(key) == weights[name][key] for key in shared), name)
    check_layout(shards, m["shard_limit"])
    check_files(root, m, stored, any(t["encoding"] == "nf4" for t in m["tensors"].values()),
                SEGMENTS in m["extensions"])
    for name, t in m["tensors"].items():
        w = weights[name]
        if t["encoding"] == "nf4":
            need("V04", all(map(math.isfinite, scales(w))), name)
            last = w[""][(w["count"] - 1) // 2::max((w["count"] + 1) // 2, 1)]
            need("V05", w["count"] % 2 == 0 or all(byte & 15 == 7 for byte in last), name)
        parts = [w.get(part, b"") for part in ("", *PARTS, *[OFFSET] * bool(w.get("segments")))]
        data = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        need("V01", sha(w[""] if t["encoding"] == "dense" else data) == t["sha256"], name)
    return m["tensors"], weights

def f32(x):
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)

def scales(w):
    if not w["double_quant"]:
        return [a for (a,) in struct.iter_unpack("<f", w[ABSMAX])]
    table, nested = struct.unpack("<256f", w[NESTED_MAP]), memoryview(w[NESTED]).cast("f")
    n = len(w["offsets"])
    blocks, seconds = len(w[ABSMAX]) // n, len(nested) // n
    return [f32(f32(table[q] * nested[i // blocks * seconds + i % blocks // 256])
                + w["offsets"][i // blocks]) for i, q in enumerate(w[ABSMAX])]

def decode(tensor, w):
    """Return the float32 values of an NF4 weight, in the order of the logical tensor."""
    levels, a = struct.unpack("<16f", w[MAP]), scales(w)
    size, blocks, values = (w["count"] + 1) // 2, -(-w["count"] // w["block_size"]), []
    for s in range(w["segments"] or 1):
        codes = (code for byte in w[""][s * size:(s + 1) * size] for code in (byte >> 4, byte & 15))
        values += [f32(levels[code] * a[s * blocks + i // w["block_size"]])
                   for i, code in zip(range(w["count"]), codes, strict=False)]
    columns = tensor["shape"][0] if tensor["transposed"] else 1
    return [value for k in range(columns) for value in values[k::columns]]

def main(bundle, name=None):
    tensors, weights = verify(Path(bundle))
    if name is None:
        print(f"sound: {len(tensors)} tensors, fingerprint {fingerprint(tensors)}")
    elif tensors[name]["encoding"] == "nf4":
        print(*decode(tensors[name], weights[name]))
    else:
        print(bytes(weights[name][""]).hex())

if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Broken as error:
        sys.exit(print(error) or 4)
