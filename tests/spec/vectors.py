"""The vectors of the specification, for the tests beside this file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "spec"
VECTORS = SPEC / "vectors"
INDEX: dict[str, list[dict[str, Any]]] = json.loads((VECTORS / "index.json").read_text("utf-8"))
EVERY = [(kind, vector) for kind in ("valid", "invalid") for vector in INDEX[kind]]
NAMES = [f"{kind}/{vector['name']}" for kind, vector in EVERY]
QUANTIZED = [vector for vector in INDEX["valid"] if vector["dequantized"]]


def load(path: Path) -> ModuleType:
    """Import a file that is not on the path: the minireader, a tool."""
    spec = importlib.util.spec_from_file_location(f"_loaded_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


minireader = load(SPEC / "minireader.py")


def minireader_verdict(path: Path) -> str | None:
    """Return the rule that the minireader finds broken."""
    try:
        minireader.verify(path)
    except minireader.Broken as broken:
        return str(broken)[:3]
    return None
