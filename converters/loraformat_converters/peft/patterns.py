r"""PEFT's name patterns, matched in bounded time.

``rank_pattern`` and ``alpha_pattern`` map regular expressions to values. PEFT takes the first
one, in the order of the file, for which ``re.match(rf"(.*\.)?({key})$", name)`` succeeds. A
stranger's pattern can keep `re` busy for years (``(a+)+$``), so that only patterns without
repetition go to it. For the others the set of positions where a part of the pattern can end
is computed from the set where it can begin, once for each part and position: at most
parts x length² steps, whatever the pattern. It finds what `re` finds, because PEFT asks
only *whether* a pattern matches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from loraformat.errors import InputError, UnsupportedError, printable

__all__ = ["Pattern", "PatternTable"]

_LONGEST = 512
_DEEPEST = 32
#: Steps for all patterns on all modules of an adapter: about half a minute.
_MOST_STEPS = 30_000_000

_TOKEN = re.compile(
    r"(?P<refused>\(\?(?!:|P<)|\\[1-9])|(?P<open>\((?:\?:|\?P<\w+>)?)|(?P<close>\))|(?P<bar>\|)"
    r"|(?P<repeat>(?:[*+?]|\{(?P<low>\d*)(?P<comma>,?)(?P<high>\d*)\})(?<!\{\})(?P<mode>[?+]?))"
    r"|(?P<atom>\[\^?\]?(?:\\.|[^\]\\])*\]"
    r"|\\(?:x..|u.{4}|U.{8}|N\{[^}]*\}|0[0-7]{0,2}|.)|.)",
    re.DOTALL,
)
#: Letters, dots (of any kind), digits: a name, more or less.
_WITHOUT_REPETITION = re.compile(r"(?:[\w.^$-]|\\[.\-_])*", re.ASCII)
_LITERAL = re.compile(r"(?:[\w-]|\\[.\-_])+", re.ASCII)


@dataclass(frozen=True, eq=False)
class _Node:
    """A part of a pattern: an atom, all of `parts` in order, one of them, or the first repeated."""

    atom: re.Pattern[str] | None = None
    parts: tuple[_Node, ...] = ()
    either: bool = False
    low: int = 1
    high: int | None = 1


class Pattern:
    r"""A regular expression that is matched as PEFT does, in bounded time.

    Raises
    ------
    InputError
        If it is no regular expression.
    UnsupportedError
        If it is not regular (a back-reference, looking around), or too long.

    Examples
    --------
    >>> Pattern(r"(a+)+").matches("model." + "a" * 64 + "!")
    False
    >>> Pattern(r"layers\.[0-3]\.mlp\.\w+_proj").matches("model.layers.2.mlp.up_proj")
    True
    """

    def __init__(self, key: str) -> None:
        if len(key) > _LONGEST:
            raise UnsupportedError(
                f"pattern {printable(key)} has more than {_LONGEST} characters", hint=_REMEDY
            )
        self.key = key
        text = rf"(.*\.)?({key})$"
        self.slow = not _WITHOUT_REPETITION.fullmatch(key)
        if self.slow:
            _check_depth(key)
        try:
            self._regex = re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                f"pattern {printable(key)} is no regular expression: {error}", hint=_REMEDY
            ) from None
        if self.slow:
            self._root = _Parser(key, text).whole()

    def matches(self, name: str) -> bool:
        """Tell whether PEFT would take this pattern for a module of that name."""
        return self.steps(name)[0]

    def steps(self, name: str) -> tuple[bool, int]:
        """Return what `matches` does, and how many steps that took."""
        if not self.slow:
            return self._regex.match(name) is not None, 1
        run = _Run(name)
        return run.ends(self._root, 0) != 0, run.steps


_REMEDY = "name the modules in full, one pattern for each"


def _check_depth(key: str) -> None:
    # Counted roughly, brackets in classes too: nothing that a person writes comes near.
    depth = deepest = 0
    for character in key:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    if deepest > _DEEPEST:
        raise UnsupportedError(
            f"pattern {printable(key)} nests more than {_DEEPEST} groups", hint=_REMEDY
        )


class _Parser:
    """Takes a pattern apart that `re` has already found to be well formed."""

    def __init__(self, key: str, text: str) -> None:
        self._key = key
        self._tokens = [match for match in _TOKEN.finditer(text)]
        self._next = 0

    def whole(self) -> _Node:
        return self._choice()

    def _choice(self) -> _Node:
        branches = [self._sequence()]
        while self._next < len(self._tokens) and self._tokens[self._next]["bar"]:
            self._next += 1
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else _Node(parts=tuple(branches), either=True)

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._next < len(self._tokens):
            token = self._tokens[self._next]
            if token["bar"] or token["close"]:
                break
            self._next += 1
            if token["refused"]:
                self._refuse(token[0])
            elif token["open"]:
                parts.append(self._choice())
                self._next += 1  # the bracket that closes it
            elif token["repeat"]:
                parts[-1] = self._repeated(parts[-1], token)
            else:
                parts.append(_Node(atom=_atom(token[0])))
        return parts[0] if len(parts) == 1 else _Node(parts=tuple(parts))

    def _repeated(self, part: _Node, token: re.Match[str]) -> _Node:
        if token["mode"] == "+":
            self._refuse(token[0])
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(token[0][0], (None, None))
        if low is None:
            low = int(token["low"] or 0)
            high = int(token["high"]) if token["high"] else None if token["comma"] else low
        return _Node(parts=(part,), low=low, high=high)

    def _refuse(self, part: str) -> None:
        raise UnsupportedError(
            f"pattern {printable(self._key)} uses {printable(part)} (a back-reference, looking "
            "around, flags, or a possessive or atomic part), which is not matched here",
            hint=_REMEDY,
        )


@lru_cache(maxsize=1024)
def _atom(text: str) -> re.Pattern[str]:
    return re.compile(text)


class _Run:
    """One pattern on one name: sets of positions are the bits of an integer."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._known: dict[tuple[_Node, int], int] = {}

    @property
    def steps(self) -> int:
        """Parts times positions that were looked at."""
        return len(self._known)

    def ends(self, node: _Node, start: int) -> int:
        """Return where a part can end that begins at a position."""
        key = (node, start)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._compute(node, start)
        return found

    def _compute(self, node: _Node, start: int) -> int:
        here = 1 << start
        if node.atom is not None:
            match = node.atom.match(self._name, start)
            return 0 if match is None else 1 << match.end()
        if node.either:
            found = 0
            for part in node.parts:
                found |= self.ends(part, start)
            return found
        if (node.low, node.high) == (1, 1):
            for part in node.parts:
                here = self._from_all(part, here)
            return here
        return self._repeat(node, here)

    def _from_all(self, node: _Node, starts: int) -> int:
        found = 0
        while starts:
            last = starts & -starts
            found |= self.ends(node, last.bit_length() - 1)
            starts ^= last
        return found

    def _repeat(self, node: _Node, here: int) -> int:
        # More rounds than the name has positions change nothing: a part that moves runs out of
        # name, and one that does not may be repeated at will.
        most, part = len(self._name) + 1, node.parts[0]
        for _ in range(min(node.low, most)):
            here = self._from_all(part, here)
        rounds = most if node.high is None else min(node.high - node.low, most)
        reached = here
        for _ in range(rounds):
            here = self._from_all(part, here) & ~reached
            if not here:
                break
            reached |= here
        return reached


class PatternTable:
    """Values by pattern: the first that matches wins.

    Parameters
    ----------
    values : mapping of str to float
        In the order of the file.
    field : str
        Its name in the config, for messages.

    Examples
    --------
    >>> PatternTable({"q_proj": 3, ".*_proj": 5}, "alpha_pattern").all("layers.0.q_proj")
    [('q_proj', 3), ('.*_proj', 5)]
    """

    def __init__(self, values: Mapping[str, float], field: str) -> None:
        self._field = field
        self._exact: dict[str, tuple[int, str, float]] = {}
        self._patterns: list[tuple[int, Pattern, float]] = []
        self._left = _MOST_STEPS
        for number, (key, value) in enumerate(values.items()):
            if _LITERAL.fullmatch(key):
                self._exact.setdefault(key.replace("\\", ""), (number, key, value))
            else:
                self._patterns.append((number, Pattern(key), value))

    def all(self, name: str) -> list[tuple[str, float]]:
        """Return every pattern that matches a module, and its value, in order.

        Raises
        ------
        UnsupportedError
            If there are too many patterns for so many modules.
        """
        parts = name.split(".")
        tails = (".".join(parts[first:]) for first in range(len(parts)))
        found = [self._exact[tail] for tail in tails if tail in self._exact]
        for number, pattern, value in self._patterns:
            matches, steps = pattern.steps(name)
            self._left -= steps
            if self._left < 0:
                raise UnsupportedError(
                    f"{self._field} has too many patterns for so many modules", hint=_REMEDY
                )
            if matches:
                found.append((number, pattern.key, value))
        return [(key, value) for _, key, value in sorted(found)]
