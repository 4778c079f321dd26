"""Fast lookup of PEFT's rank and alpha patterns.

Most keys are names of modules as PEFT writes them, with dots that stand for any character. They
are looked up; what is left is matched one by one, and all of it from one budget.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from loraformat.errors import UnsupportedError
from loraformat_converters.peft.patterns import REMEDY, Budget, Pattern, TooCostlyError

__all__ = ["PatternTable", "tails"]

#: Steps for all patterns on all modules of an adapter: about a second.
_MOST_STEPS = 2_000_000
#: What compiling them may cost, in characters: about half a second.
_MOST_CHARACTERS = 50_000
#: A pattern costs as much as so many characters, a class with a range beyond ASCII as these.
_EACH, _WIDE_CLASS = 40, 1000

_NAME = re.compile(r"(?:[\w.-]|\\[.\-_])+", re.ASCII)
_ESCAPED = re.compile(r"\\(.)|\.")
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]|\\[uUN]")

_Entry = tuple[int, str, float]


class PatternTable:
    """Values by pattern, in the order of the file; the first matching pattern wins.

    An `InputError` says which key is no regular expression, an `UnsupportedError` which is not
    regular, or that matching all would cost too much. ``field`` is the name in these messages.

    Examples
    --------
    >>> PatternTable({"q_proj": 3, ".*_proj": 5}, "alpha_pattern").all("layers.0.q_proj")
    [('q_proj', 3), ('.*_proj', 5)]
    """

    def __init__(self, values: Mapping[str, float], field: str) -> None:
        self._field = field
        #: By length and places of the characters that may be any, by the other characters.
        self._names: dict[int, dict[tuple[int, ...], dict[str, _Entry]]] = {}
        self._patterns: list[tuple[int, Pattern, float]] = []
        self._budget = Budget(_MOST_STEPS)
        characters = Budget(_MOST_CHARACTERS)
        for number, (key, value) in enumerate(values.items()):
            if _NAME.fullmatch(key):
                self._add_name(number, key, value)
            else:
                try:
                    characters.take(_cost(key))
                except TooCostlyError:
                    raise self._too_costly() from None
                self._patterns.append((number, Pattern(key), value))

    def _add_name(self, number: int, key: str, value: float) -> None:
        text = _ESCAPED.sub(lambda found: found[1] or "\n", key)  # no name of a module has that
        places = tuple(place for place, character in enumerate(text) if character == "\n")
        alike = self._names.setdefault(len(text), {}).setdefault(places, {})
        alike.setdefault(text.replace("\n", ""), (number, key, value))

    def _too_costly(self) -> UnsupportedError:
        return UnsupportedError(
            f"{self._field} has too many patterns for so many modules, or too intricate ones",
            hint=REMEDY,
        )

    def all(self, name: str) -> list[tuple[str, float]]:
        """Return every pattern that matches a module, and its value, in order."""
        try:
            found = self._named(name)
            for number, pattern, value in self._patterns:
                if pattern.matches(name, self._budget):
                    found.append((number, pattern.key, value))
        except TooCostlyError:
            raise self._too_costly() from None
        return [(key, value) for _, key, value in sorted(found)]

    def _named(self, name: str) -> list[_Entry]:
        found = []
        for tail in tails(name):
            for places, alike in self._names.get(len(tail), {}).items():
                self._budget.take(1 + len(places) // 4)
                entry = alike.get(_without(tail, places))
                if entry is not None:
                    found.append(entry)
        return found


def tails(name: str) -> list[str]:
    """Return a module's name, and what is left of it after each dot."""
    return [name, *(name[place + 1 :] for place, sign in enumerate(name) if sign == ".")]


def _without(text: str, places: tuple[int, ...]) -> str:
    starts = (0, *(place + 1 for place in places))
    return "".join(text[a:b] for a, b in zip(starts, (*places, len(text)), strict=True))


def _cost(key: str) -> int:
    wide = key.count("[") if _BEYOND_ASCII.search(key) else 0
    return _EACH + len(key) + _WIDE_CLASS * wide
