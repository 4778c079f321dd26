"""``general.*`` and ``loraformat.*`` metadata of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from loraformat.bundle.manifest_rules import MAX_MANIFEST_BYTES, parse_manifest
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.quantization_history import to_text
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.storage.safe_paths import MANIFEST_NAME
from loraformat_converters.gguf.base.model_card import card_keys, model_name
from loraformat_converters.gguf.container.types import GGMLType
from loraformat_converters.gguf.container.values import GGUFValue

__all__ = [
    "CONFIG_KEY",
    "FILE_TYPES",
    "FINGERPRINT_KEY",
    "GENERATION_KEY",
    "QUANTIZED_KEY",
    "general_keys",
]

#: ``config.json`` and ``generation_config.json`` of the model that a base was made of.
CONFIG_KEY = "loraformat.config"
GENERATION_KEY = "loraformat.generation_config"
#: Of the bundle that a base was made of.
FINGERPRINT_KEY = "loraformat.base.fingerprint"
#: How the numbers were quantized before, see `loraformat.model.quantization_history`.
QUANTIZED_KEY = "loraformat.source.quantized"

#: llama.cpp's number of a file of mostly one type.
FILE_TYPES = {
    GGMLType.F32: 0,
    GGMLType.F16: 1,
    GGMLType.Q4_0: 2,
    GGMLType.Q4_1: 3,
    GGMLType.Q8_0: 7,
    GGMLType.Q5_0: 8,
    GGMLType.Q5_1: 9,
    GGMLType.BF16: 32,
}
_PHI3 = re.compile(r"phi-?3", re.IGNORECASE)
#: Tokens that llama.cpp looks up in every model whose name says Phi-3, and dies if they miss.
_PHI3_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}


def general_keys(
    checkpoint: Checkpoint, architecture: str, kind: GGMLType, tokens: Mapping[str, GGUFValue]
) -> dict[str, GGUFValue]:
    """Return the keys of a base that do not depend on its architecture.

    ``kind`` is the type of most weights, ``tokens`` are the tokenizer's keys.
    """
    origin = checkpoint.provenance
    texts = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": _name(checkpoint, tokens),
    }
    if origin.repo:
        texts["general.source.repo_url"] = f"https://huggingface.co/{origin.repo}"
    keys = {key: GGUFValue.text(text) for key, text in texts.items()}
    keys |= card_keys(checkpoint.files)
    keys["general.file_type"] = GGUFValue.uint(FILE_TYPES[kind])
    keys["general.quantization_version"] = GGUFValue.uint(2)
    ours = {
        FINGERPRINT_KEY: _fingerprint(checkpoint),
        "loraformat.source.format": origin.format,
        "loraformat.source.repo": origin.repo,
        "loraformat.source.revision": origin.revision,
        QUANTIZED_KEY: to_text(origin.quantized) if origin.quantized else None,
        CONFIG_KEY: _text(checkpoint.config),
        GENERATION_KEY: _text(_carried(checkpoint, "generation_config.json")),
    }
    return keys | {key: GGUFValue.text(text) for key, text in ours.items() if text is not None}


def _name(checkpoint: Checkpoint, tokens: Mapping[str, GGUFValue]) -> str:
    origin = checkpoint.provenance.repo or checkpoint.path.resolve().name
    name = model_name(checkpoint.files)
    name = name or origin.rsplit("/", 1)[-1].removesuffix(".gguf") or "model"
    if _PHI3.search(name) and not set(tokens["tokenizer.ggml.tokens"].value) >= _PHI3_TOKENS:
        return _PHI3.sub("phi_3", name)
    return name


def _fingerprint(checkpoint: Checkpoint) -> str | None:
    if checkpoint.provenance.format == "gguf":
        return checkpoint.provenance.fingerprint
    if checkpoint.provenance.format != "loraformat":
        return None
    raw = SafeDirectory(checkpoint.path).read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    return parse_manifest(raw, checkpoint.path / MANIFEST_NAME).fingerprint


def _carried(checkpoint: Checkpoint, name: str) -> bytes | None:
    return next((file.read() for file in checkpoint.files if file.path == name), None)


def _text(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode("utf-8", "replace")
