"""Find phrases that user-facing texts avoid, listed with their replacements in ``words.txt``.

Checked are the pages, the string literals of the packages and the first lines of their docstrings.

    python tools/check_words.py            # all of them
    python tools/check_words.py FILE ...   # some files
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORDS = Path(__file__).with_name("words.txt")
_PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md", "converters/README.md")
_MODULES = ("loraformat/**/*.py", "converters/loraformat_converters/**/*.py")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

Text = tuple[int, str]


def words(path: Path = WORDS) -> list[tuple[re.Pattern[str], str]]:
    """Return the avoided patterns and what to write instead.

    Raises
    ------
    ValueError
        If a line is not ``PATTERN => TERM``.
    """
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern, arrow, term = line.partition(" => ")
        if not arrow or not term:
            raise ValueError(f"{path.name}: not PATTERN => TERM: {line}")
        spaced = pattern.replace(" ", r"\s+")
        found.append((re.compile(rf"(?<![\w-])(?:{spaced})(?![\w-])", re.IGNORECASE), term))
    return found


def page_texts(page: str) -> Iterator[Text]:
    """Yield a page's text with the number of its first line; nothing is left out."""
    yield 1, page


def module_texts(source: str) -> Iterator[Text]:
    """Yield a module's user-facing texts: string literals, and first lines of docstrings."""
    tree = ast.parse(source)
    docstrings = {}
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            literal = node.body[0]
            assert isinstance(literal, ast.Expr)
            docstrings[id(literal.value)] = text.partition("\n")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, docstrings.get(id(node), node.value)


def findings(path: Path, avoided: list[tuple[re.Pattern[str], str]]) -> Iterator[str]:
    """Yield one line per avoided phrase in a file."""
    source = path.read_text(encoding="utf-8")
    texts = module_texts(source) if path.suffix == ".py" else page_texts(source)
    for line, text in texts:
        for pattern, term in avoided:
            for match in pattern.finditer(text):
                at = line + text.count("\n", 0, match.start())
                said = " ".join(match[0].split())
                yield f"{path}:{at}: {said!r}; use: {term}"


def main(arguments: list[str]) -> int:
    """Check the given files, or all; return the exit code."""
    paths = [Path(argument) for argument in arguments] or [
        path for glob in (*_PAGES, *_MODULES) for path in sorted(ROOT.glob(glob))
    ]
    avoided = words()
    found = [line for path in paths for line in findings(path, avoided)]
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
