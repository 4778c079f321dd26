"""Prompt formats from chat templates, if transformers is installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraformat.runtimes.chat import ChatFormat

__all__ = ["format_of"]


def format_of(template: str, special: Mapping[str, str]) -> ChatFormat | None:
    """Return the pieces of a chat template; None if it has none, or nobody can render it.

    Parameters
    ----------
    template : str
    special : mapping of str to str
        Texts of special tokens by kind.
    """
    if find_spec("transformers") is None:
        return None
    from loraformat.train.data.template_probe import format_of_template

    return format_of_template(template, special)
