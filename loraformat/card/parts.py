"""Card sections common to adapters and bundles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loraformat.card.document import Document
from loraformat.card.facts import Base, FileFact
from loraformat.card.markup import code, link, table
from loraformat.storage.byte_sizes import format_size
from loraformat.version import __version__

__all__ = ["base_rows", "document", "file_table", "joined", "names"]

_MAX_FILES = 200
_MAX_NAMES = 12


def base_rows(base: Base) -> list[list[str]]:
    """Return the rows of a table about the base."""
    rows = [["base model", link(base.repo)]]
    if base.revision:
        rows.append(["revision of the base", code(base.revision)])
    if base.licence:
        shown = base.licence.name or base.licence.identifier
        rows.append(["licence", code(shown)])
    return rows


def file_table(files: list[FileFact]) -> str:
    """Return a table of all files with sizes and hashes."""
    rows = [
        [code(file.path), format_size(file.nbytes), f"`{file.sha256}`"]
        for file in files[:_MAX_FILES]
    ]
    more = len(files) - _MAX_FILES
    said = f"\n\nand {more} more." if more > 0 else ""
    return f"## Files\n\n{table(['file', 'size', 'SHA-256'], rows)}{said}" if rows else ""


def names(words: Iterable[str]) -> str:
    """Return at most twelve names as code spans."""
    shown = [code(word) for word in words]
    return ", ".join(
        shown[:_MAX_NAMES] + ([f"… ({len(shown)})"] if len(shown) > _MAX_NAMES else [])
    )


def joined(parts: Iterable[str]) -> str:
    """Join non-empty parts with blank lines."""
    return "\n\n".join(part for part in parts if part)


def document(
    repo: str, sections: Iterable[str], fields: dict[str, Any], *, first: bool = False
) -> Document:
    """Return a card that is titled by its repository and ends with the name of the generator."""
    footer = f"Written by loraformat {__version__} from the files themselves."
    facts = frozenset({"base_model", "base_model_relation", "library_name"})
    return Document(repo.rpartition("/")[2], joined([*sections, footer]), fields, facts, first)
