"""The exception hierarchy.

::

    LoraFormatError                  exit 1   something failed; the message says what to do
    ├── UsageError                   exit 2   options that contradict each other
    ├── InputError                   exit 3   the input is missing, damaged or hostile
    │   ├── FormatError                       ... it breaks a rule of the specification
    │   ├── NonFiniteError                    ... NaN or infinity where NF4 needs numbers
    │   ├── FileChangedError                  ... it changed while it was being read
    │   └── UnsupportedError                  ... it is sound, but cannot be expressed
    ├── OutputError                  exit 5   the output exists, is the input, or is locked
    ├── ResourceError                exit 6   not enough disk or memory
    ├── HubError                     exit 7   the network or the Hugging Face Hub
    ├── DivergedError                exit 1   training came to NaN or infinity
    └── MissingDependencyError       exit 1   an optional package is not installed

A message is one sentence in four parts: *which file: what is wrong, what was
wanted (rule, byte or tensor); what to do next.*
"""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike, fspath

__all__ = [
    "DivergedError",
    "FileChangedError",
    "FormatError",
    "HubError",
    "InputError",
    "LoraFormatError",
    "MissingDependencyError",
    "NonFiniteError",
    "OutputError",
    "ResourceError",
    "UnsupportedError",
    "UsageError",
    "nearest",
    "printable",
]

_LONGEST_QUOTE = 120


def printable(text: object) -> str:
    r"""Escape untrusted text so that it cannot disturb a terminal.

    Parameters
    ----------
    text : object
        Anything; its ``str`` is shown.

    Returns
    -------
    str
        At most 120 characters, control characters escaped.

    Examples
    --------
    >>> printable("layer\x1b[31m")
    'layer\\x1b[31m'
    """
    try:
        said = str(text)
    except ValueError:  # Python writes no integer of more than 4300 digits
        said = "an integer of thousands of digits"
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in said[: _LONGEST_QUOTE + 1])
    return shown if len(shown) <= _LONGEST_QUOTE else shown[: _LONGEST_QUOTE - 1] + "…"


def nearest(name: str, names: Iterable[str]) -> str:
    """Return words that name the most similar of some names; "" if there are none.

    Examples
    --------
    >>> nearest("model.q_prj", ["model.q_proj", "lm_head"])
    '; the nearest is model.q_proj'
    """
    from difflib import get_close_matches

    found = get_close_matches(name, list(names), 1, 0.0)
    return f"; the nearest is {printable(found[0])}" if found else ""


class LoraFormatError(Exception):
    """Root of the tree.

    Parameters
    ----------
    problem : str
        What is wrong and what was wanted.
    path : str or os.PathLike, optional
        The file or directory it is about; leads the message.
    hint : str, optional
        What to do next; ends the message.
    """

    exit_code = 1

    def __init__(
        self, problem: str, *, path: str | PathLike[str] | None = None, hint: str | None = None
    ) -> None:
        self.problem = problem
        self.path = None if path is None else fspath(path)
        self.hint = hint
        super().__init__(problem)

    def __str__(self) -> str:
        where = f"{printable(self.path)}: " if self.path is not None else ""
        what_next = f"; {self.hint}" if self.hint else ""
        return f"{where}{self.problem}{what_next}"


class UsageError(LoraFormatError):
    """Options that contradict each other or name something that does not exist."""

    exit_code = 2


class InputError(LoraFormatError):
    """The input is missing, damaged or hostile."""

    exit_code = 3


class FormatError(InputError):
    """The input breaks a rule of the specification.

    Parameters
    ----------
    rule : str
        Rule id, as printed in ``spec/loraformat-1.1.md``, for example ``"H04"``.
    problem : str
        What is wrong and what was wanted.
    path, hint
        As in `LoraFormatError`.
    """

    def __init__(
        self,
        rule: str,
        problem: str,
        *,
        path: str | PathLike[str] | None = None,
        hint: str | None = None,
    ) -> None:
        self.rule = rule
        super().__init__(problem, path=path, hint=hint)

    def __str__(self) -> str:
        return f"{super().__str__()} [rule {self.rule}]"


class NonFiniteError(InputError):
    """A value is NaN or infinite where NF4 needs a finite number.

    Parameters
    ----------
    tensor : str
        Name of the tensor.
    position : int
        Index of the first such value in the flattened tensor (elements, row-major).
    value : float
        The value found.
    """

    def __init__(self, tensor: str, position: int, value: float) -> None:
        self.tensor, self.position, self.value = tensor, position, value
        super().__init__(
            f"tensor {printable(tensor)} holds {value} at element {position}, but NF4 can only "
            "store finite numbers",
            hint="repair the checkpoint, or exclude this tensor from quantization with --skip",
        )


class FileChangedError(InputError):
    """A file grew, shrank or was rewritten while it was being read."""


class UnsupportedError(InputError):
    """The input is sound but is something that loraformat, or the target, cannot express."""


class OutputError(LoraFormatError):
    """The output already exists, is the input itself, or is being written by another process."""

    exit_code = 5


class ResourceError(LoraFormatError):
    """Not enough free disk space or memory for the work that was asked for."""

    exit_code = 6


class HubError(LoraFormatError):
    """The network failed, or the Hugging Face Hub refused."""

    exit_code = 7


class DivergedError(LoraFormatError):
    """A loss or a gradient in training is NaN or infinite; nothing was updated with it."""


class MissingDependencyError(LoraFormatError):
    """An optional package that this operation needs is not installed."""
