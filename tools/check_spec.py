"""Hold the specifications, the code and the vectors to each other.

    python tools/check_spec.py

Fails on a MUST without a rule id, a rule with more than one MUST, a rule without an
invalid vector, a vector of an unknown rule, a rule that the code or the small reader does
not raise or that only they know, a SHOULD that names one side only, a JSON Schema that
is none, and tables that differ from the code's.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

_RULE = re.compile(r"\*\*\[([A-Z][0-9]{2})\]\*\*")
_STRONG = re.compile(r"\b(MUST|SHALL|REQUIRED)\b")


@dataclass(frozen=True)
class Specification:
    """A text, the pattern of its rule ids, its reader and the index of its vectors."""

    text: str
    ids: str
    reader: str
    vectors: str

    def raised(self, *paths: Path) -> set[str]:
        """Return the rule ids of this text that stand in some code."""
        pattern = re.compile(f'"({self.ids})"')
        return {rule for path in paths for rule in pattern.findall(path.read_text("utf-8"))}

    def broken(self) -> set[str]:
        """Return the rule ids that have an invalid vector."""
        index = json.loads((ROOT / "spec" / self.vectors).read_text("utf-8"))
        return {vector["rule"] for vector in index["invalid"]}


BUNDLE = Specification(
    "loraformat-1.1.md", "[ABHLMNV][0-9]{2}", "minireader.py", "vectors/index.json"
)
# U16, U32 and U64 are dtypes.
UNDO = Specification("undo-1.0.md", "U(?:0[0-9]|1[0-5])", "miniundo.py", "vectors/undo/index.json")


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a Markdown text, without code blocks and the words on BCP 14."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", prose):
        if "BCP 14" not in paragraph and not paragraph.startswith("Each MUST"):
            yield " ".join(paragraph.split())


def text_findings(text: str) -> Iterator[str]:
    """Yield what is wrong with the text alone."""
    for paragraph in paragraphs(text):
        ids, strong = _RULE.findall(paragraph), _STRONG.findall(paragraph)
        if strong and not ids:
            yield f"a {strong[0]} without a rule id: {paragraph[:90]}"
        if ids and (len(ids) != 1 or len(strong) != 1):
            yield f"rule {ids[0]} holds {len(strong)} MUSTs under {len(ids)} ids, wanted one each"
        if "SHOULD" in paragraph and "writer SHOULD" in paragraph and "llm_int8" not in paragraph:
            follows = text_after(text, paragraph)
            if "reader does not depend on" not in follows:
                yield f"a SHOULD that does not say what a reader does: {paragraph[:90]}"
    for rule, count in Counter(_RULE.findall(text)).items():
        if count > 1:
            yield f"rule {rule} is defined {count} times"


def text_after(text: str, paragraph: str) -> str:
    """Return a paragraph and the start of what follows it, in one line."""
    flat = " ".join(text.split())
    start = flat.find(paragraph)
    return flat[start : start + len(paragraph) + 100]


def rules_of(text: str) -> set[str]:
    """Return the rule ids that the specification defines."""
    return set(_RULE.findall(text))


def set_findings(spec: set[str], other: set[str], where: str) -> Iterator[str]:
    """Yield the rules that the text and another place do not share."""
    for rule in sorted(spec - other):
        yield f"rule {rule} has no place in {where}"
    for rule in sorted(other - spec):
        yield f"rule {rule} of {where} is not in the specification"


def schema_findings() -> Iterator[str]:
    """Yield what is wrong with the JSON Schema."""
    jsonschema: Any = import_module("jsonschema")
    path = ROOT / "spec" / "schema" / "manifest.schema.json"
    schema: Any = json.loads(path.read_text("utf-8"))
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        yield f"{path.name} is not a JSON Schema: {error.message}"


def table_findings(text: str) -> Iterator[str]:
    """Yield the tables of the text that are not those of the code."""
    sys.path.insert(0, str(ROOT))
    from loraformat.nf4.tables import LEVEL_BITS, NESTED_MAP_BITS

    rows = re.findall(r"^ *(\d+): ((?:[0-9a-f]{8} ?){8})$", text, re.MULTILINE)
    printed = [int(word, 16) for _, row in rows for word in row.split()]
    if printed != [*LEVEL_BITS, *NESTED_MAP_BITS]:
        yield "the printed tables are not those of loraformat.nf4.tables"


def spec_findings(spec: Specification) -> Iterator[str]:
    """Yield what is wrong between a text, the code, the small reader and the vectors."""
    text = (ROOT / "spec" / spec.text).read_text("utf-8")
    rules = rules_of(text)
    code = spec.raised(*(ROOT / "loraformat").rglob("*.py"))
    yield from text_findings(text)
    yield from set_findings(rules, code, "the code")
    yield from set_findings(rules, spec.raised(ROOT / "spec" / spec.reader), f"spec/{spec.reader}")
    yield from set_findings(rules, spec.broken(), f"spec/{spec.vectors}")


def findings() -> list[str]:
    """Return everything that is wrong."""
    text = (ROOT / "spec" / BUNDLE.text).read_text("utf-8")
    return [
        *spec_findings(BUNDLE),
        *spec_findings(UNDO),
        *schema_findings(),
        *table_findings(text),
    ]


def main() -> int:
    """Print the findings; return the exit code."""
    found = findings()
    for finding in found:
        print(finding, file=sys.stderr)
    if not found:
        texts = ((ROOT / "spec" / spec.text).read_text("utf-8") for spec in (BUNDLE, UNDO))
        count = sum(len(rules_of(text)) for text in texts)
        print(f"{count} rules: texts, code, small readers and vectors agree")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
