"""What a field of a row holds, checked: a string, a list, or JSON that was written as a string."""

from __future__ import annotations

from typing import Any

from loraformat.storage import strict_json

__all__ = ["KindError", "as_list", "as_string", "from_json", "type_name"]


class KindError(ValueError):
    """A row that means nothing, or two things."""


def as_string(fields: dict[str, Any], name: str) -> str:
    """Return a field that must be a string.

    Raises
    ------
    KindError
    """
    value = fields[name]
    if not isinstance(value, str):
        raise KindError(f'"{name}" is {type_name(value)}, wanted a string')
    return value


def as_list(value: Any, name: str) -> list[Any]:
    """Return a value that must be a list with something in it, or JSON of one.

    Raises
    ------
    KindError

    Examples
    --------
    >>> as_list('["a"]', "messages")
    ['a']
    """
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = from_json(value, name)
    if not isinstance(value, list) or not value:
        raise KindError(
            f'"{name}" is {type_name(value) if value != [] else "empty"}, wanted a list'
        )
    return value


def from_json(text: str, name: str) -> Any:
    """Return what a string of JSON says, as tables keep what differs from row to row.

    Raises
    ------
    KindError
        If it is not strict JSON.

    Examples
    --------
    >>> from_json('[{"name": "add"}]', "tools")
    [{'name': 'add'}]
    """
    try:
        return strict_json.loads(text.encode("utf-8", "surrogatepass"))
    except strict_json.StrictJsonError as error:
        raise KindError(f'"{name}" is a string, and not strict JSON: {error}') from None


def type_name(value: Any) -> str:
    """Name a value's type as JSON does."""
    names: dict[type, str] = {
        str: "a string", list: "a list", dict: "an object", bool: "true or false",
        int: "a number", float: "a number", type(None): "null",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)
