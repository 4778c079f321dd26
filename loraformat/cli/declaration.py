"""The declaration of a verb: the signature and the docstring of its public function.

They are read from the function's source, without importing it: ``--help`` and the completion of a
shell need not wait for numpy.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loraformat import HOMES

__all__ = ["Declaration", "Parameter", "declaration_of"]

_SECTION = re.compile(r"\n\n[A-Z][A-Za-z ]+\n-{3,}\n")
_ENTRY = re.compile(r"^(\w[\w, ]*)(?: : .*)?\n((?:(?:    .*)?(?:\n|$))+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a public function.

    `default` is ``...`` if there is none; `text` is its entry in the docstring, in one line.
    """

    name: str
    annotation: str
    default: Any
    text: str


@dataclass(frozen=True, slots=True)
class Declaration:
    """The docstring of a verb before its sections, and its parameters in their order."""

    text: str
    parameters: Mapping[str, Parameter]


@cache
def declaration_of(name: str) -> Declaration:
    """Return the declaration of a public function.

    Examples
    --------
    >>> found = declaration_of("remove")
    >>> list(found.parameters), found.parameters["path"].text
    (['path'], '``BUNDLE/adapters/NAME``.')
    """
    spec = find_spec(HOMES[name])
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    function = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name
    )
    text, *sections = _SECTION.split(ast.get_docstring(function) or "")
    texts = {
        each: " ".join(entry[2].split())
        for entry in _ENTRY.finditer(f"{sections[0]}\n" if sections else "")
        for each in entry[1].split(", ")
    }
    found = function.args
    required = [None] * (len(found.args) - len(found.defaults))
    defaults = [*required, *found.defaults, *found.kw_defaults]
    parameters = {}
    for argument, value in zip([*found.args, *found.kwonlyargs], defaults, strict=True):
        assert argument.annotation is not None
        default = ... if value is None else ast.literal_eval(value)
        kind, words = ast.unparse(argument.annotation), texts.get(argument.arg, "")
        parameters[argument.arg] = Parameter(argument.arg, kind, default, words)
    return Declaration(text, parameters)
