"""Portable names of files and adapters, and names that a bundle takes for itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

__all__ = [
    "CARD_NAME",
    "MANIFEST_NAME",
    "is_adapter_name",
    "is_portable_path",
    "is_safe_path",
    "unlistable",
]

#: Makes a directory a bundle.
MANIFEST_NAME = "loraformat.json"
#: The model card: carried but not listed in the manifest, so that it can be edited on the Hub.
CARD_NAME = "README.md"

_PATH_PART = re.compile(r"[A-Za-z0-9_+@=,()\[\]-][A-Za-z0-9_.+@=,()\[\] -]{0,254}")
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_DEVICES = {"con", "prn", "aux", "nul"} | {
    f"{port}{n}" for port in ("com", "lpt") for n in range(10)
}
_OWN_FILES = {MANIFEST_NAME, "model.safetensors.index.json"}


def is_safe_path(path: object) -> bool:
    """Tell whether a carried file may have this path.

    It stays inside its directory on every system, and takes no name that the bundle itself
    needs: the manifest, the index, a top-level ``.safetensors``, or anything in ``adapters``.

    Examples
    --------
    >>> is_safe_path("1_Pooling/config.json"), is_safe_path("../x"), is_safe_path("/etc/passwd")
    (True, False, False)
    """
    if not isinstance(path, str) or not is_portable_path(path):
        return False
    first, *rest = path.lower().split("/")
    return first not in _OWN_FILES | {"adapters"} and (
        bool(rest) or not first.endswith(".safetensors")
    )


def is_portable_path(path: str) -> bool:
    """Tell whether a path stays inside its directory on every system (rule M08)."""
    parts = path.split("/")
    return (
        len(path) <= 1024
        and len(parts) <= 8
        and all(
            _PATH_PART.fullmatch(part)
            and part[-1] not in ". "
            and part.split(".")[0].rstrip().lower() not in _DEVICES
            for part in parts
        )
    )


def unlistable(names: Iterable[str], is_safe: Callable[[str], bool]) -> str | None:
    """Return the first name that is not safe (M08), or is another one but for case (M12)."""
    seen: set[str] = set()
    for name in names:
        if not is_safe(name) or name.lower() in seen:
            return name
        seen.add(name.lower())
    return None


def is_adapter_name(name: str) -> bool:
    """Tell whether an adapter may have this name (M09).

    Examples
    --------
    >>> is_adapter_name("medical-v1.2"), is_adapter_name(".."), is_adapter_name("nul")
    (True, False, False)
    """
    return bool(_ADAPTER_NAME.fullmatch(name)) and is_portable_path(name)
