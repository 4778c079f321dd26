"""``adapter_config.json``: supported fields, and the scaling."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraformat.errors import InputError, printable
from loraformat.model.adapter import LARGEST_SCALING
from loraformat.storage.foreign_json import is_finite, parse_object
from loraformat.storage.safe_directory import SafeDirectory
from loraformat_converters.peft.pattern_table import PatternTable, tails
from loraformat_converters.peft.refusals import INVOCATION

__all__ = ["CONFIG_NAME", "MAX_CONFIG_BYTES", "LoraSettings", "read_config", "text"]

CONFIG_NAME = "adapter_config.json"

#: Rule A02 of the specification.
MAX_CONFIG_BYTES = 1 << 20
_MAX_RANK = 16384
_MOST_PARAMETERS = 64


class LoraSettings:
    """The fields of a LoRA config that determine the meaning of its tensors.

    An `InputError` says which of them is damaged or hostile. Nothing is refused by name here.
    """

    def __init__(self, config: dict[str, Any], path: Path) -> None:
        self.config, self._path = config, path
        #: What a user should know; grows as modules are looked up.
        self.notes: list[str] = []
        self.rslora = config.get("use_rslora") is True
        #: The base holds its weights as (in, out).
        self.conv1d = config.get("fan_in_fan_out") is True
        #: Major and minor; (0, 0) if it is not there (before 0.18).
        self.version = _version(config.get("peft_version"))
        tokens = self._list(INVOCATION, "token ids", lambda t: type(t) is int and 0 <= t < 2**32)
        self.invocation_tokens: tuple[int, ...] = tuple(tokens)
        self._leaves = self._leaves_by_home()
        self._rank = int(self._number(config.get("r", 8), "r", whole=True))
        self._alpha = self._number(config.get("lora_alpha", 8), "lora_alpha")
        self._alphas = self._table("alpha_pattern", whole=False)
        self._ranks = self._table("rank_pattern", whole=True)
        self._known_alphas: dict[str, float] = {}
        self._ambiguous: set[tuple[str, str]] = set()

    def _list(self, field: str, what: str, is_one: Callable[[Any], bool]) -> list[Any]:
        value = self.config.get(field) or []
        if not isinstance(value, list) or not all(map(is_one, value)):
            raise InputError(f"{field} is not a list of {what}", path=self._path)
        return value

    def _leaves_by_home(self) -> dict[str, list[tuple[int, str]]]:
        found: dict[str, list[tuple[int, str]]] = {}
        names = self._list("target_parameters", "names", lambda name: isinstance(name, str))
        for number, entry in enumerate(dict.fromkeys(names)):
            home, _, leaf = entry.rpartition(".")
            found.setdefault(home, []).append((number, leaf))
        if any(len(leaves) > _MOST_PARAMETERS for leaves in found.values()):
            raise InputError(
                f"target_parameters names more than {_MOST_PARAMETERS} parameters of one module",
                path=self._path,
            )
        return found

    def parameters_of(self, module: str) -> list[tuple[str, str]]:
        """Return module and name of the target parameters that may belong to a module, in order.

        The home is empty where an entry names a parameter only, which any module may have.
        """
        homes = ("", *tails(module))
        entries = [(n, home, leaf) for home in homes for n, leaf in self._leaves.get(home, ())]
        return [(home, leaf) for _, home, leaf in sorted(entries)]

    def _table(self, field: str, *, whole: bool) -> PatternTable:
        value = self.config.get(field) or {}
        if not isinstance(value, dict):
            raise InputError(f"{field} is not an object", path=self._path)
        numbers = {
            key: self._number(number, f"{field} of {printable(key)}", whole=whole)
            for key, number in value.items()
        }
        try:
            return PatternTable(numbers, field)
        except InputError as error:
            error.path, error.problem = str(self._path), f"{field}: {error.problem}"
            raise

    def _number(self, value: Any, what: str, *, whole: bool = False) -> float:
        if not is_finite(value) or (
            whole and (type(value) is not int or not 1 <= value <= _MAX_RANK)
        ):
            wanted = f"an integer from 1 to {_MAX_RANK}" if whole else "a finite number"
            raise InputError(f"{what} is {printable(value)}, wanted {wanted}", path=self._path)
        return float(value)

    def alpha(self, module: str) -> float:
        """Return α of a module: the first matching pattern wins, as in PEFT.

        PEFT saves patterns in alphabetical order, whatever order they were trained in, so that
        two which disagree about a module are noted.
        """
        if module in self._known_alphas:
            return self._known_alphas[module]
        found = self._alphas.all(module)
        if len({value for _, value in found}) > 1:
            pair = (found[0][0], found[1][0])
            if pair not in self._ambiguous:
                self._ambiguous.add(pair)
                self.notes.append(
                    f"alpha_pattern: {printable(pair[0])} and {printable(pair[1])} both match "
                    f"{printable(module)} with different values; the first is taken, as PEFT does "
                    "on loading, but PEFT sorts them on saving: training may have used the other"
                )
        alpha = self._known_alphas[module] = found[0][1] if found else self._alpha
        return alpha

    def rank(self, module: str) -> int:
        """Return the rank that the config names for a module."""
        found = self._ranks.all(module)
        return int(found[0][1]) if found else self._rank

    def scaling(self, module: str, rank: int) -> float:
        """Return α/r, or α/√r with rsLoRA; r is the rank of the module's own factors."""
        alpha = self.alpha(module)
        scaling = alpha / (math.sqrt(rank) if self.rslora else rank)
        if abs(scaling) > LARGEST_SCALING:
            raise InputError(
                f"lora_alpha of {printable(module)} is {alpha:g}, and its scaling exceeds float32",
                path=self._path,
                hint="correct lora_alpha; common values are the rank and twice the rank",
            )
        return scaling


def text(value: object) -> str | None:
    """Return a field's value if it is a text that says something."""
    return value if isinstance(value, str) and value else None


def _version(value: Any) -> tuple[int, int]:
    parts = value.split(".") if isinstance(value, str) else []
    numbers = [int(part) for part in parts[:2] if part.isdecimal() and len(part) < 9]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)


def read_config(folder: SafeDirectory) -> dict[str, Any]:
    """Read a config as PEFT does, within bounds."""
    return parse_object(folder.read(CONFIG_NAME, MAX_CONFIG_BYTES), folder.path / CONFIG_NAME)
