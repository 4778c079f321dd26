r"""PEFT's name patterns, matched in bounded time.

``rank_pattern`` and ``alpha_pattern`` map regular expressions to values. PEFT takes the first
one, in the order of the file, for which ``re.match(rf"(.*\.)?({key})$", name)`` succeeds. A
stranger's pattern can keep `re` busy for years (``(a+)+$``), so that only parts without
repetition go to it. The set of positions where a part of the pattern can end is computed from
the set where it can begin, once for each part and position; every such step is taken from a
`Budget`, also those of repetitions. It finds what `re` finds, because PEFT asks only *whether* a
pattern matches.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import accumulate
from operator import or_

from loraformat.errors import InputError, UnsupportedError, printable

__all__ = ["REMEDY", "Budget", "Pattern", "TooCostlyError"]

REMEDY = "name the modules in full, one pattern for each"

_LONGEST = 512
_DEEPEST = 32

_TOKEN = re.compile(
    r"(?P<refused>\(\?(?!:|P<)|\\[1-9])|(?P<open>\((?:\?:|\?P<\w+>)?)|(?P<close>\))|(?P<bar>\|)"
    r"|(?P<repeat>(?:[*+?]|\{(?P<low>\d*)(?P<comma>,?)(?P<high>\d*)\})(?<!\{\})(?P<mode>[?+]?))"
    r"|(?P<atom>\[\^?\]?(?:\\.|[^\]\\])*\]"
    r"|\\(?:x..|u.{4}|U.{8}|N\{[^}]*\}|0[0-7]{0,2}|.)|.)",
    re.DOTALL,
)


_CHARACTERS = re.compile(r"(?:[\w.-]|\\[.\-_])+", re.ASCII)
_ESCAPED = re.compile(r"\\.")


class TooCostlyError(Exception):
    """A `Budget` is spent."""


class Budget:
    """Remaining matching steps; two million take about a second."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def take(self, steps: int) -> None:
        """Consume steps; `TooCostlyError` if there are not so many left."""
        self.left -= steps
        if self.left < 0:
            raise TooCostlyError


@dataclass(frozen=True, eq=False)
class _Node:
    """A part of a pattern: `text` that repeats nothing, or `parts`: in order, one, or repeated."""

    text: str | None = None
    parts: tuple[_Node, ...] = ()
    either: bool = False
    low: int = 1
    high: int | None = 1


class Pattern:
    r"""A regular expression that is matched as PEFT does, in bounded time.

    One that is not regular (a back-reference, looking around), or too long, is refused.

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
                f"pattern {printable(key)} has more than {_LONGEST} characters", hint=REMEDY
            )
        _check_depth(key)
        self.key = key
        text = rf"(.*\.)?({key})$"
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                f"pattern {printable(key)} is not a regular expression: {error}", hint=REMEDY
            ) from None
        alone = _Parser(key, key)
        self._root = alone.choice()
        self._alone = alone.done  # not so for "a)|(b"
        if not self._alone:
            self._root = _Parser(key, text).choice()
        self._tail = _tail(self._root) if self._alone else None

    def matches(self, name: str, budget: Budget | None = None) -> bool:
        """Tell whether PEFT would match a module name; a million steps if no budget is given."""
        budget = budget or Budget(1_000_000)
        if self._tail is not None and not name.endswith("\n"):
            budget.take(1)
            ending, width = self._tail
            if width > len(name) or not ending.match(name, len(name) - width):
                return False
        run = _Run(name, budget)
        if not self._alone:
            return run.ends(self._root, 0) != 0
        ends = run.from_all(self._root, _beginnings(name))
        last = {len(name), len(name) - name.endswith("\n")}
        return any(ends >> position & 1 for position in last)


def _tail(root: _Node) -> tuple[re.Pattern[str], int] | None:
    """Return the fixed suffix of all matches and its length, if known."""
    in_order = root.parts and not root.either and (root.low, root.high) == (1, 1)
    text = (root.parts[-1] if in_order else root).text
    if text is None or not _CHARACTERS.fullmatch(text):
        return None
    return re.compile(text), len(_ESCAPED.sub(".", text))


def _beginnings(name: str) -> int:
    r"""Return where ``(.*\.)?`` can end, as bits."""
    found, position = 1, name.find(".")
    line = name.find("\n") % (len(name) + 1)
    while 0 <= position < line:
        found |= 1 << position + 1
        position = name.find(".", position + 1)
    return found


def _check_depth(key: str) -> None:
    # Counted roughly, brackets in classes too: nothing that a person writes comes near.
    steps = ((character == "(") - (character == ")") for character in key)
    if max(accumulate(steps), default=0) > _DEEPEST:
        raise UnsupportedError(
            f"pattern {printable(key)} nests more than {_DEEPEST} groups", hint=REMEDY
        )


class _Parser:
    """Parser for patterns that `re` has already validated."""

    def __init__(self, key: str, text: str) -> None:
        self._key = key
        self._tokens = list(_TOKEN.finditer(text))
        self._next = 0

    @property
    def done(self) -> bool:
        return self._next == len(self._tokens)

    def choice(self) -> _Node:
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
                parts.append(self.choice())
                self._next += 1  # the bracket that closes it
            elif token["repeat"]:
                parts[-1] = self._repeated(parts[-1], token)
            else:
                parts.append(_Node(text=token[0]))
        parts = _joined(parts)
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
            hint=REMEDY,
        )


def _joined(parts: list[_Node]) -> list[_Node]:
    """Join adjacent parts without repetition."""
    found: list[_Node] = []
    for part in parts:
        if part.text is not None and found and found[-1].text is not None:
            found[-1] = _Node(text=found[-1].text + part.text)
        else:
            found.append(part)
    return found


_compiled = lru_cache(maxsize=4096)(re.compile)


class _Run:
    """One pattern on one name: sets of positions are the bits of an integer."""

    def __init__(self, name: str, budget: Budget) -> None:
        self._name, self._budget = name, budget
        self._known: dict[tuple[_Node, int], int] = {}

    def ends(self, node: _Node, start: int) -> int:
        """Return where a part can end that begins at a position."""
        self._budget.take(1)
        key = (node, start)
        if key not in self._known:
            self._budget.take(2)
            self._known[key] = self._compute(node, start)
        return self._known[key]

    def from_all(self, node: _Node, starts: int) -> int:
        """Return where a part can end that begins at any of some positions."""
        found = 0
        while starts:
            last = starts & -starts
            found |= self.ends(node, last.bit_length() - 1)
            starts ^= last
        return found

    def _compute(self, node: _Node, start: int) -> int:
        here = 1 << start
        if node.text is not None:
            self._budget.take(len(node.text) // 32)
            match = _compiled(node.text).match(self._name, start)
            return 0 if match is None else 1 << match.end()
        if node.either:
            return reduce(or_, [self.ends(part, start) for part in node.parts])
        if (node.low, node.high) == (1, 1):
            for part in node.parts:
                here = self.from_all(part, here)
            return here
        return self._repeat(node, here)

    def _repeat(self, node: _Node, here: int) -> int:
        # More rounds than the name has positions change nothing: a part that moves runs out of
        # name, and one that does not may be repeated at will.
        most, part = len(self._name) + 1, node.parts[0]
        for _ in range(min(node.low, most)):
            before, here = here, self.from_all(part, here)
            if here in (before, 0):
                break
        rounds = most if node.high is None else min(node.high - node.low, most)
        reached = here
        for _ in range(rounds):
            here = self.from_all(part, here) & ~reached
            if not here:
                break
            reached |= here
        return reached
