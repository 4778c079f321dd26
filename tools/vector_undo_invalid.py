"""The vectors of undo records that break one rule each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from undo_arithmetic import Delta
from vector_undo import Draft, Tensor, table
from vector_undo_valid import COLUMNS, ROWS, V, W, dora, experts, plain, raw, rows, zeros

Json = dict[str, Any]
Vector = tuple[str, str, str, Draft]


def with_record(draft: Draft, spoil: Callable[[Json], Any]) -> Draft:
    """Return a draft whose record is changed."""
    draft.record = spoil
    return draft


def with_entry(draft: Draft, name: str = W, **changes: Any) -> Draft:
    """Return a draft with members of one entry changed."""
    return with_record(draft, lambda r: r["tensors"][name].update(changes))


def with_term(draft: Draft, name: str = W, **changes: Any) -> Draft:
    """Return a draft with members of one entry's first term changed."""
    return with_record(draft, lambda r: r["tensors"][name]["terms"][0].update(changes))


def with_text(change: Callable[[str], str]) -> Draft:
    """Return a draft whose record's text is changed."""
    draft = plain()
    draft.text = change
    return draft


def with_part(draft: Draft, name: str, change: Callable[[bytes], bytes]) -> Draft:
    """Return a draft with the bytes of a part changed."""

    def spoil(parts: dict[str, Tensor]) -> None:
        data = change(parts[name][2]) if name in parts else change(b"")
        parts[name] = ("U8", [len(data)], data)

    draft.parts = spoil
    return draft


def with_tile(change: Callable[[bytes], bytes], draft: Draft | None = None) -> Draft:
    """Return a draft with the code of every tile changed, and its length with it."""
    draft = draft or plain()
    draft.tile = change
    return draft


def of_bytes(dtype: str, shape: list[int]) -> Draft:
    """Return a draft whose first part has another type."""
    draft = plain()

    def spoil(parts: dict[str, Tensor]) -> None:
        name = f"{W}.zeros"
        parts[name] = (dtype, shape, parts[name][2])

    draft.parts = spoil
    return draft


def with_merged(name: str, change: Callable[[Tensor], Tensor]) -> Draft:
    """Return a draft with a tensor of the merged model changed after the fact."""
    draft = plain()
    draft.merged = lambda tensors: tensors.update({name: change(tensors[name])})
    return draft


def flipped(tensor: Tensor) -> Tensor:
    """Return a tensor with one bit changed."""
    dtype, shape, data = tensor
    return dtype, shape, bytes([data[0] ^ 1]) + data[1:]


def positions(*numbers: int) -> Callable[[bytes], bytes]:
    """Return what puts other 64-bit integers in a part's place."""
    return lambda _: b"".join(n.to_bytes(8, "little", signed=True) for n in numbers)


def texts() -> Iterator[Vector]:
    """Yield what is wrong in the text alone."""
    draft = plain()
    draft.metadata = lambda m: m.update({"other": m.pop("loraformat.undo")})
    yield "u01-no-member", "U01", "the metadata has another member only", draft
    for name, reason, change in (
        ("not-json", "the text ends early", lambda t: t[:-1]),
        ("duplicate-key", "a member stands twice", lambda t: '{"version":"1.0",' + t[1:]),
        ("array", "an array, not an object", lambda t: f"[{t}]"),
        ("version-2", "version 2.0", lambda t: t.replace('"1.0"', '"2.0"')),
        ("version-number", "a number for a version", lambda t: t.replace('"1.0"', "1.0")),
        ("formula", "another arithmetic", lambda t: t.replace("fixed-point-1", "fixed-point-2")),
    ):
        yield f"u02-{name}", "U02", reason, with_text(change)
    for name, reason, draft in (
        ("member-missing", "no tile_elements", with_record(plain(), lambda r: r.pop(
            "tile_elements"))),
        ("member-more", "a member that 1.0 does not have", with_record(plain(), lambda r: r.update(
            colour=1))),
        ("tile-zero", "tiles of no elements", with_record(plain(), lambda r: r.update(
            tile_elements=0))),
        ("tile-text", "a text for a number", with_record(plain(), lambda r: r.update(
            tile_elements="24"))),
        ("tensors-array", "an array for tensors", with_record(plain(), lambda r: r.update(
            tensors=[]))),
        ("twice", "a name changed and unchanged", with_record(plain(), lambda r: r[
            "unchanged"].update({W: "0" * 64}))),
        ("digest", "a digest in capitals", with_record(plain(), lambda r: r["unchanged"].update(
            {k: v.upper() for k, v in r["unchanged"].items()}))),
        ("adapter-weight", "a weight of an adapter that is no number", with_record(
            plain(), lambda r: r["adapters"][0].update(weight=None))),
        ("mode", "an unknown mode", with_entry(plain(), mode="delta")),
        ("mode-array", "an array for a mode", with_entry(plain(), mode=["raw"])),
        ("dtype", "intervals of integers", with_entry(plain(), dtype="I32")),
        ("shape-negative", "a negative dimension", with_entry(plain(), shape=[-ROWS, COLUMNS])),
        ("shape-huge", "a dimension of 2^62", with_entry(plain(), shape=[2**62, COLUMNS])),
        ("four-dimensions", "intervals of four dimensions", with_entry(
            plain(), shape=[1, 1, ROWS, COLUMNS])),
        ("new-with-digest", "a new tensor with an original", with_entry(
            rows(), "lm_head.weight", sha256="0" * 64)),
        ("terms-of-rows", "terms where rows are replaced", with_entry(
            rows(), "embed.weight", terms=plain().changes[W].terms and [
                plain().changes[W].terms[0].json()])),
        ("rows-descending", "rows that do not ascend", with_entry(
            rows(), "embed.weight", rows=[4, 1])),
        ("row-beyond", "a row that the tensor does not have", with_entry(
            rows(), "embed.weight", rows=[1, 5])),
        ("term-part", "an unknown part of a delta", with_term(plain(), part="all")),
        ("term-block", "a negative matrix", with_term(plain(), block=-1)),
        ("term-rows", "three ends of rows", with_term(plain(), rows=[0, 1, 2])),
        ("term-weight", "a weight that is no number", with_term(plain(), weight="1")),
    ):  # fmt: skip
        yield f"u03-{name}", "U03", reason, draft


def models() -> Iterator[Vector]:
    """Yield what does not belong together."""
    draft = plain()
    draft.merged = lambda tensors: tensors.pop(V, None) or tensors.update(more=tensors[W])
    yield "u04-tensor-more", "U04", "the model has a tensor that the record does not", draft
    draft = plain()
    draft.merged = lambda tensors: tensors.pop("norm.weight")
    yield "u04-tensor-less", "U04", "the record has a tensor that the model does not", draft
    yield (
        "u04-shape",
        "U04",
        "the merged tensor has another shape",
        with_merged(W, lambda t: (t[0], [COLUMNS, ROWS], t[2])),
    )
    yield (
        "u04-dtype",
        "U04",
        "the merged tensor is of integers",
        with_merged(W, lambda t: ("I16", t[1], t[2])),
    )
    draft = plain()
    draft.adapter = lambda tensors: tensors.update({f"{W}.a": flipped(tensors[f"{W}.a"])})
    yield "u05-adapter", "U05", "one bit of the adapter is another", draft
    yield (
        "u05-digest",
        "U05",
        "the digest is of another adapter",
        with_record(plain(), lambda r: r["adapters"][0].update(sha256="0" * 64)),
    )
    yield "u06-changed", "U06", "one bit of the changed tensor is another", with_merged(W, flipped)
    yield (
        "u06-unchanged",
        "U06",
        "one bit of the unchanged tensor is another",
        with_merged("norm.weight", flipped),
    )
    yield (
        "u07-digest",
        "U07",
        "the digest of the original is another",
        with_entry(plain(), sha256="0" * 64),
    )
    yield (
        "u07-raw",
        "U07",
        "one bit of the stored original is another",
        with_part(raw(), f"{V}.residual", lambda data: bytes([data[0] ^ 1]) + data[1:]),
    )
    yield (
        "u07-zero",
        "U07",
        "a sign for another number than zero",
        with_part(plain(), f"{W}.zeros", positions(4, 11)),
    )
    yield (
        "u07-rank",
        "U07",
        "other ranks within their intervals",
        with_tile(lambda tile: bytes(len(tile)), plain("F32", "BF16")),
    )


def codes() -> Iterator[Vector]:
    """Yield what is wrong with parts and codes."""
    wide = with_tile(lambda tile: b"\xff" * len(tile), plain("BF16"))
    yield "u08-rank", "U08", "a rank beyond its interval", wide
    yield "u08-long", "U08", "a byte too many in every tile", with_tile(lambda tile: tile + b"\0")
    yield (
        "u08-short",
        "U08",
        "a byte too few in every tile",
        with_tile(lambda tile: tile[:-1], plain("F32", "BF16")),
    )
    yield (
        "u08-rest",
        "U08",
        "a bit in what remains of a tile",
        with_tile(lambda tile: tile[:-1] + bytes([tile[-1] | 0x80]) if tile else tile),
    )
    draft = with_entry(plain(), merged_sha256="")
    yield "u08-infinite", "U08", "an infinite merged value", infinite(draft)
    yield (
        "u09-stray",
        "U09",
        "a part of no tensor",
        with_part(plain(), "other.residual", lambda _: b"?"),
    )
    yield (
        "u09-stray-kind",
        "U09",
        "zeros of a tensor stored as it is",
        with_part(raw(), f"{V}.zeros", lambda _: bytes(8)),
    )
    yield (
        "u09-raw-short",
        "U09",
        "a stored original that is too short",
        with_part(raw(), f"{V}.residual", lambda data: data[:-2]),
    )
    yield (
        "u09-raw-lies",
        "U09",
        "a shape of 2^47 elements for ten bytes",
        with_entry(raw(), V, shape=[2**47]),
    )
    yield (
        "u09-rows-short",
        "U09",
        "one row too few",
        with_part(rows(), "embed.weight.residual", lambda data: data[:8]),
    )
    yield (
        "u09-lengths",
        "U09",
        "one tile too many",
        with_part(plain(), f"{W}.lengths", lambda data: data + bytes(8)),
    )
    yield (
        "u09-lengths-sum",
        "U09",
        "lengths that add up to more",
        with_part(plain(), f"{W}.lengths", lambda data: data[:-8] + (9).to_bytes(8, "little")),
    )
    yield (
        "u09-length-negative",
        "U09",
        "a negative length that the next one makes up for",
        with_part(zeros(), f"{W}.lengths", positions(-1, 1)),
    )
    yield (
        "u09-gains",
        "U09",
        "a gain too many",
        with_part(dora(), f"{W}.gains", lambda data: data + bytes(4)),
    )
    yield (
        "u09-gains-missing",
        "U09",
        "half a gain",
        with_part(dora(), f"{W}.gains", lambda data: data[:-2]),
    )
    yield (
        "u09-zeros-half",
        "U09",
        "half a position",
        with_part(plain(), f"{W}.zeros", lambda data: data[:4]),
    )
    yield "u09-dtype", "U09", "a part of 64-bit integers", of_bytes("I64", [1])
    yield "u09-shape", "U09", "a part of two dimensions", of_bytes("U8", [2, 4])
    yield (
        "u11-beyond",
        "U11",
        "a position beyond the tensor",
        with_part(plain(), f"{W}.zeros", positions(4, ROWS * COLUMNS)),
    )
    yield (
        "u11-negative",
        "U11",
        "a negative position",
        with_part(plain(), f"{W}.zeros", positions(-44)),
    )
    yield (
        "u11-twice",
        "U11",
        "a position that stands twice",
        with_part(plain(), f"{W}.zeros", positions(4, 4)),
    )


def infinite(draft: Draft) -> Draft:
    """Return a draft whose first merged value is infinite, with the digest of that."""
    from hashlib import sha256

    made: dict[str, bytes] = {}

    def spoil(tensors: dict[str, Tensor]) -> None:
        dtype, shape, data = tensors[W]
        tensors[W] = (dtype, shape, b"\x80\x7f" + data[2:])
        made["data"] = tensors[W][2]

    def text(record: str) -> str:
        return record.replace('"merged_sha256":""', f'"merged_sha256":"{digest()}"')

    def digest() -> str:
        return sha256(made["data"]).hexdigest()

    draft.merged, draft.text = spoil, text
    return draft


def terms() -> Iterator[Vector]:
    """Yield terms that do not exist or do not fit."""
    for name, reason, draft in (
        ("adapter", "an adapter that the record does not have", with_term(plain(), adapter=1)),
        ("target", "a delta that the adapter does not have", with_term(plain(), target=V)),
        ("block", "a matrix that the tensor does not have", with_term(plain(), block=1)),
        ("bias", "a bias that the delta does not have", with_term(plain(), part="bias")),
        ("expert", "an expert of a delta without a stack", with_term(plain(), expert=0)),
        ("expert-missing", "no expert of a stack", with_term(experts(), V, expert=None)),
        ("expert-beyond", "an expert that the stack does not have", with_term(
            experts(), V, expert=2)),
        ("rows-beyond", "rows that the delta does not have", with_term(
            plain(), rows=[0, ROWS + 1])),
        ("rows-few", "fewer rows than the matrix", with_term(plain(), rows=[0, ROWS - 1])),
    ):  # fmt: skip
        yield f"u10-{name}", "U10", reason, draft
    yield (
        "u10-twice",
        "U10",
        "a term that stands twice",
        with_record(plain(), lambda r: r["tensors"][W].update(terms=r["tensors"][W]["terms"] * 2)),
    )
    draft = plain()
    wide = Delta(table(ROWS, 2, 3), table(2, COLUMNS + 1, 4))
    draft.adapters[0]["wide"] = wide
    yield (
        "u10-columns",
        "U10",
        "a delta of more columns than the matrix",
        with_term(draft, target="wide"),
    )


def invalid() -> Iterator[Vector]:
    """Yield name, rule, reason, and draft."""
    yield from texts()
    yield from models()
    yield from codes()
    yield from terms()
