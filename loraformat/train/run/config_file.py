"""Options of a run as YAML: every key and type checked, and written back as they took effect."""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from loraformat.errors import InputError, MissingDependencyError, UsageError, printable
from loraformat.train.run.options import SETTINGS, Setting, value_of

__all__ = ["dump", "read"]

_MAX_BYTES = 1 << 20
_WANTED = {
    "integer": "a whole number",
    "number": "a number",
    "text": "a text",
    "texts": "a text or a list of texts",
    "names": "names, comma-separated or as a list",
    "flag": "true or false",
    "size": "a size such as 4GB",
    "ranks": "a mapping of names to ranks",
}


def read(path: Path) -> dict[str, Any]:
    """Read a YAML file of options: values for `TrainOptions`, by field.

    Keys are flags without the leading dashes, or with underscores.

    Raises
    ------
    InputError
        If it is no such file, a key is unknown or occurs twice, or a value is of another type.
    MissingDependencyError
        If PyYAML is not installed.
    """
    known = {setting.name: setting for setting in SETTINGS}
    values: dict[str, Any] = {}
    for key, value in _load(path).items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = get_close_matches(name, known, 1, 0.5)
            meant = f"; did you mean {known[near[0]].flag!r}?" if near else ""
            raise InputError(f"has no option {printable(key)!r}{meant}", path=path)
        if name in values:
            raise InputError(f"has {printable(key)!r} twice", path=path)
        if value is not None:
            values[name] = _value(known[name], value, path)
    return values


def _load(path: Path) -> dict[Any, Any]:
    try:
        import yaml
    except ImportError:
        raise MissingDependencyError(
            "a YAML file needs PyYAML", hint="run: pip install 'loraformat[train]'"
        ) from None
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise InputError(f"is longer than {_MAX_BYTES} bytes", path=path)
        text = data.decode("utf-8")
        _refuse_duplicates(yaml.compose(text, Loader=yaml.SafeLoader), path)
        loaded = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", path=path) from None
    except InputError:
        raise
    except Exception as error:  # KeyError for "!!bool x", AttributeError for "!!timestamp x", ...
        said = printable(" ".join(str(error).split()))
        raise InputError(f"is no YAML: {said}", path=path) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise InputError("is not a mapping of options to values", path=path)
    return loaded


def _refuse_duplicates(tree: Any, path: Path) -> None:
    """YAML's own loader would keep the last of two equal keys."""
    seen: set[str] = set()
    for key, _ in getattr(tree, "value", ()) if getattr(tree, "id", "") == "mapping" else ():
        name = str(key.value)
        if name in seen:
            raise InputError(f"has {printable(name)!r} twice", path=path)
        seen.add(name)


def _value(setting: Setting, value: Any, path: Path) -> Any:
    """Return a value of YAML in the form that `TrainOptions` holds."""
    try:
        # YAML 1.1 reads 2e-4, without a point, as a text.
        of_text = setting.kind == "number" and isinstance(value, str)
        read_as = float(value) if of_text else value
        fits = _fits(setting.kind, read_as) and (not setting.choices or value in setting.choices)
        taken = value_of(setting, read_as) if fits else None
    except (ValueError, UsageError):
        taken = None
    if taken is None:
        wanted = " or ".join(setting.choices) or _WANTED[setting.kind]
        shown = printable(repr(value))
        raise InputError(f"option {setting.flag} is {shown}, wanted {wanted}", path=path)
    return float(taken) if setting.kind == "number" else taken


def _fits(kind: str, value: Any) -> bool:
    """Tell whether a value has the type of a kind of options."""
    if isinstance(value, bool):
        return kind == "flag"
    if kind == "number":
        return isinstance(value, int | float) and math.isfinite(value)
    if kind in ("texts", "names"):
        return all(isinstance(one, str) for one in (value if isinstance(value, list) else [value]))
    if kind == "ranks":
        return isinstance(value, dict) and all(
            isinstance(name, str) and _fits("integer", rank) for name, rank in value.items()
        )
    if kind == "size":
        return isinstance(value, int | str)
    return kind != "flag" and isinstance(value, int if kind == "integer" else str)


def dump(options: Mapping[str, Any]) -> str:
    """Return options, as `TrainOptions.to_json` gives them, as YAML.

    What is not set is left out, and so is what is empty by default; the text can be read back.

    Examples
    --------
    >>> print(dump({"rank": 8, "targets": [], "ranks": {}, "alpha": None}), end="")
    rank: 8
    targets: []
    """
    import yaml

    empty = {setting.flag: setting.plain(setting.default) for setting in SETTINGS}
    told = {
        name: value
        for name, value in options.items()
        if value is not None and (value not in ("", [], {}) or value != empty.get(name))
    }
    return str(yaml.safe_dump(told, sort_keys=False, allow_unicode=True))
