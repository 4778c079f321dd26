"""Metadata of a GGUF adapter."""

from __future__ import annotations

import re

from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat_converters.gguf.base.general_keys import CONFIG_KEY, FINGERPRINT_KEY
from loraformat_converters.gguf.container.reader import GGUFFile
from loraformat_converters.gguf.container.types import ValueType
from loraformat_converters.gguf.container.values import GGUFValue

__all__ = [
    "ALPHA",
    "INVOCATION",
    "SOURCE_KEY",
    "adapter_keys",
    "base_model",
    "invocation_tokens",
]

ALPHA = "adapter.lora.alpha"
INVOCATION = "adapter.alora.invocation_tokens"
#: Of the bundle that the adapter belongs to, as JSON.
SOURCE_KEY = "loraformat.base.source"
_HUB = "https://huggingface.co/"
_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def adapter_keys(
    adapter: Adapter, base: Checkpoint, architecture: str, alpha: float
) -> dict[str, GGUFValue]:
    """Return the metadata of an adapter, with its base's config to read the file without it.

    Alpha is stored as float32, the only type that llama.cpp reads without aborting.
    """
    texts = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.name": adapter.path.resolve().name.removesuffix(".gguf") or "adapter",
    }
    named = adapter.base_model or base.provenance.repo
    keys = {key: GGUFValue.text(text) for key, text in texts.items()}
    if named:
        keys["general.base_model.count"] = GGUFValue.uint(1)
        for key, text in _named(named).items():
            keys[f"general.base_model.0.{key}"] = GGUFValue.text(text)
    keys[ALPHA] = GGUFValue.of(ValueType.FLOAT32, alpha)
    if adapter.invocation_tokens:
        tokens = list(adapter.invocation_tokens)
        keys[INVOCATION] = GGUFValue.of_array(ValueType.UINT32, tokens)
    keys["general.quantization_version"] = GGUFValue.uint(2)
    ours = {
        FINGERPRINT_KEY: adapter.base_fingerprint,
        SOURCE_KEY: adapter.base_source,
        "loraformat.source.format": adapter.format,
        CONFIG_KEY: None if base.config is None else base.config.decode("utf-8", "replace"),
    }
    return keys | {key: GGUFValue.text(text) for key, text in ours.items() if text is not None}


def _named(base: str) -> dict[str, str]:
    """Return name, organization and address of a Hub id; of a path the last part alone."""
    if not _ID.fullmatch(base):
        return {"name": base.replace("\\", "/").rstrip("/").rpartition("/")[2] or "base"}
    organization, _, name = base.partition("/")
    return {"name": name, "organization": organization, "repo_url": _HUB + base}


def base_model(gguf: GGUFFile) -> str | None:
    """Return what a file calls its base: a Hub id, or a name."""
    url = gguf.text("general.base_model.0.repo_url", "")
    if url.startswith(_HUB) and _ID.fullmatch(url.removeprefix(_HUB)):
        return url.removeprefix(_HUB)
    return gguf.text("general.base_model.0.name", "") or None


def invocation_tokens(gguf: GGUFFile) -> tuple[int, ...]:
    """Return the tokens from which on an aLoRA acts; () if it is none."""
    if INVOCATION not in gguf.metadata:
        return ()
    return tuple(gguf.array(INVOCATION, ValueType.UINT32))
