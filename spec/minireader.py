"""A complete reader of loraformat 1.0 that needs only Python: verifies a bundle, decodes a tensor.

Written from loraformat-1.0.md alone, where each rule id below is explained.
Usage: python minireader.py BUNDLE [TENSOR]; exit 4 and the rule id if a rule is broken.
"""
import hashlib, json, math, re, struct, sys  # noqa: E401
from pathlib import Path

BYTES = dict(BOOL=1, U8=1, I8=1, F8_E4M3=1, F8_E5M2=1, U16=2, I16=2, F16=2, BF16=2, U32=4, I32=4,
             F32=4, U64=8, I64=8, F64=8, C64=8)
WEIGHTS = dict(float32="F32", float16="F16", bfloat16="BF16")
ABSMAX, NESTED, MAP, NESTED_MAP, STATE = PARTS = (
    ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")
TABLES = {MAP: "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a",
          NESTED_MAP: "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"}
UNCLEAN = "[\0-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
PART = r"(?!(con|prn|aux|nul|(com|lpt)[0-9]) *(\.|$))[a-z0-9_+@=,()\[\]-]([a-z0-9_.+@=,()\[\] -]{0,253}[^. ])?"
PATH = re.compile(f"(?=.{{1,1024}}$){PART}(/{PART}){{0,7}}", re.ASCII | re.IGNORECASE)
INDEX, BASE = "model.safetensors.index.json", "loraformat.base_fingerprint"


class Broken(Exception):
    """A rule is broken."""


def need(rule, ok, what):
    if not ok:
        raise Broken(f"{rule}: {what}")


def sha(*chunks):
    return hashlib.sha256(b"".join(chunks)).hexdigest()


def strict(raw, rule, what):
    def check(value, ok=True):
        need(rule, ok, f"{what} is not strict JSON")
        return value
    def depth(value):
        inner = value.values() if type(value) is dict else value if type(value) is list else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=lambda word: check(word, False),
                           object_pairs_hook=lambda pairs: check(dict(pairs), len(dict(pairs)) == len(pairs)),
                           parse_int=lambda digits: check(int(digits[:21]), len(digits) <= 20),
                           parse_float=lambda digits: check(float(digits), math.isfinite(float(digits))))
        json.dumps(value, ensure_ascii=False).encode("utf-8")
        return check(value, depth(value) <= 32)
    except (ValueError, RecursionError):
        check(None, False)


def clean(text, longest):
    return type(text) is str and 0 < len(text.encode("utf-8", "replace")) <= longest and not re.search(UNCLEAN, text)


def name_ok(name):
    return clean(name, 512) and "/" not in name and "\\" not in name


def counts(value, limit, length=8, least=0):
    return type(value) is list and len(value) <= length and all(type(n) is int and least <= n < limit for n in value)


def read_header(path, profile):
    """Return the stored tensors in the order of their bytes, the metadata and the header's bytes."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    need("H01", len(data) >= 8 and 2 <= size <= min(len(data) - 8, 100_000_000), path)
    raw, start = data[8:8 + size], 8 + size
    need("H02", raw[:1] == b"{" and raw.rstrip(b" ")[-1:] == b"}", path)
    fields = strict(raw, "H03", path)
    meta = fields.pop("__metadata__", {})
    need("H04", type(meta) is dict and all(type(v) is str for v in meta.values()), path)
    for name, e in fields.items():
        need("H05", name_ok(name), repr(name))
        need("H06", type(e) is dict and set(e) == {"dtype", "shape", "data_offsets"} and type(e["dtype"]) is str
             and e["dtype"] in BYTES and counts(e["shape"], 1 << 48) and counts(e["data_offsets"], 1 << 63, 2)
             and len(e["data_offsets"]) == 2, name)
        begin, end = e["data_offsets"]
        need("H07", end - begin == math.prod(e["shape"]) * BYTES[e["dtype"]], name)
        e["file"], e["bytes"] = path.name, data[start + begin:start + end]
    ordered, position = sorted(fields, key=lambda n: fields[n]["data_offsets"]), 0
    for name in ordered:
        need("H08", fields[name]["data_offsets"][0] == position, name)
        position = fields[name]["data_offsets"][1]
    need("H09", start + position == len(data), path)
    need("L01", not profile or start % 4096 == 0, path)
    need("L02", not profile or ordered == list(fields), path)
    return {name: fields[name] for name in ordered}, meta, data[:start]


def read_manifest(raw):
    m = strict(raw, "M01", "manifest")
    need("M02", type(m) is dict and m.get("format") == "loraformat", "format")
    version = re.fullmatch(r"1\.(0|[1-9][0-9]{0,5})", str(m.get("format_version")))
    need("M03", version and type(m["format_version"]) is str, "format_version")
    def members(rule, value, names):
        need(rule, type(value) is dict and names <= set(value) and (version[1] != "0" or names == set(value)), names)
    def digest(value):
        need("M06", type(value) is str and re.fullmatch("[0-9a-f]{64}", value), value)
    def text(value):
        return value == "" or (clean(value, 1 << 20) and len(value) <= 1024)
    def files(value, allowed):
        need("M08", type(value) is dict, "files")
        need("M12", len({path.lower() for path in value}) == len(value), list(value))
        for path, record in value.items():
            need("M08", PATH.fullmatch(path) and allowed(path.lower()), path)
            members("M08", record, {"bytes", "sha256"})
            need("M08", counts([record["bytes"]], 1 << 53), path)
            digest(record["sha256"])
    members("M04", m, {"format", "format_version", "created_by", "source", "fingerprint", "shard_limit",
                       "shards", "tensors", "files", "adapters", "extensions"})
    need("M04", type(m["tensors"]) is dict, "tensors")
    for name, t in m["tensors"].items():
        nf4 = type(t) is dict and t.get("encoding") == "nf4"
        members("M05", t, {"encoding", "dtype", "shape", "sha256"} | ({
            "block_size", "double_quant", "transposed", "relative_rms_error"} if nf4 else set()))
        need("M05", name_ok(name) and t["encoding"] in ("nf4", "dense") and type(t["dtype"]) is str and t["dtype"] in (
            WEIGHTS.values() if nf4 else BYTES) and counts(t["shape"], 1 << 53), name)
        error = t.get("relative_rms_error")
        need("M05", not nf4 or (counts([t["block_size"]], 1 << 53) and type(t["double_quant"]) is bool
             and type(t["transposed"]) is bool and len(t["shape"]) == 2 >= t["transposed"] * len(t["shape"])
             and (error is None or type(error) in (int, float) and error >= 0)), name)
        digest(t["sha256"])
    need("M10", m["fingerprint"] == fingerprint(m["tensors"]), m["fingerprint"])
    source = m["source"]
    need("M04", type(source) is dict and "format" in source and (version[1] != "0" or set(source) <= {
        "format", "repo", "revision"}) and text(m["created_by"]) and counts([m["shard_limit"]], 1 << 53)
        and all(text(source.get(key, "")) for key in ("format", "repo", "revision")), "manifest")
    need("M07", type(m["shards"]) is list and 1 <= len(m["shards"]) <= 99_999, "shards")
    for number, s in enumerate(m["shards"], 1):
        members("M07", s, {"file", "bytes", "header_sha256"})
        need("M07", s["file"] == f"model-{number:05}-of-{len(m['shards']):05}.safetensors"
             and counts([s["bytes"]], 1 << 53), s["file"])
        digest(s["header_sha256"])
    files(m["files"], lambda path: path.split("/")[0] not in ("loraformat.json", INDEX, "adapters")
          and not re.fullmatch(r"[^/]*\.safetensors", path))
    need("M09", type(m["adapters"]) is dict, "adapters")
    need("M12", len({name.lower() for name in m["adapters"]}) == len(m["adapters"]), list(m["adapters"]))
    for name, adapter in m["adapters"].items():
        need("M09", re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,95}", name) and PATH.fullmatch(name), name)
        members("M09", adapter, {"files"})
        files(adapter["files"], lambda path: True)
        need("M09", {"adapter_config.json", "adapter_model.safetensors"} <= set(adapter["files"]), name)
    need("M11", type(m["extensions"]) is dict and all(type(e) is dict and e.get("must_understand", True) is False
         for e in m["extensions"].values()), "extensions")
    return m
