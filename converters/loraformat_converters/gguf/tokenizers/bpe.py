"""Byte-level BPE, the simplest case: ``tokenizer.json`` whose pre-tokenizer is GPT-2's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from loraformat import strict_json
from loraformat.checkpoint import CarriedFile, Checkpoint
from loraformat.errors import InputError, UnsupportedError, printable
from loraformat_converters.gguf.types import ValueType
from loraformat_converters.gguf.values import GGUFValue

if TYPE_CHECKING:
    from loraformat_converters.gguf.container import GGUFFile

__all__ = ["files", "metadata"]

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_FILE = "tokenizer.json"


def metadata(checkpoint: Checkpoint, *, vocabulary: int, pre: str | None) -> dict[str, GGUFValue]:
    """Return the keys; see `loraformat_converters.gguf.tokenizers.metadata`."""
    tokenizer = _read(checkpoint, _FILE)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise UnsupportedError(f"{_FILE} is no BPE tokenizer", path=checkpoint.path)
    if pre is None:
        pre = _recognised(tokenizer, checkpoint)
    texts, kinds = _tokens(model, tokenizer.get("added_tokens") or [], vocabulary)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    keys = {
        "tokenizer.ggml.model": GGUFValue.of(ValueType.STRING, "gpt2"),
        "tokenizer.ggml.pre": GGUFValue.of(ValueType.STRING, pre),
        "tokenizer.ggml.tokens": GGUFValue.of_array(ValueType.STRING, texts),
        "tokenizer.ggml.token_type": GGUFValue.of_array(ValueType.INT32, kinds),
        "tokenizer.ggml.merges": GGUFValue.of_array(ValueType.STRING, merges),
    }
    named = _read(checkpoint, "tokenizer_config.json", required=False)
    for kind in ("bos", "eos", "pad"):
        text = named.get(f"{kind}_token")
        if isinstance(text, dict):
            text = text.get("content")
        if text in texts:
            key = f"tokenizer.ggml.{'padding' if kind == 'pad' else kind}_token_id"
            keys[key] = GGUFValue.of(ValueType.UINT32, texts.index(text))
    first = _first_token(tokenizer)
    keys["tokenizer.ggml.add_bos_token"] = GGUFValue.of(ValueType.BOOL, first is not None)
    return keys


def _read(checkpoint: Checkpoint, name: str, *, required: bool = True) -> dict[str, Any]:
    for file in checkpoint.files:
        if file.path == name:
            try:
                found = strict_json.loads(file.read())
            except strict_json.StrictJsonError as error:
                raise InputError(f"{name} is not strict JSON: {error}") from None
            if isinstance(found, dict):
                return found
            raise InputError(f"{name} is not a JSON object")
    if required:
        raise UnsupportedError(
            f"has no {name}, which llama.cpp's file must hold",
            path=checkpoint.path,
            hint="put the tokenizer's files beside the weights",
        )
    return {}


def _recognised(tokenizer: dict[str, Any], checkpoint: Checkpoint) -> str:
    kind = tokenizer.get("pre_tokenizer")
    if isinstance(kind, dict) and kind.get("type") == "ByteLevel" and kind.get("use_regex", True):
        return "gpt-2"
    raise UnsupportedError(
        f"the pre-tokenizer of {_FILE} is not one that is recognised",
        path=checkpoint.path,
        hint="name llama.cpp's with --pre",
    )


def _tokens(
    model: dict[str, Any], added: list[dict[str, Any]], vocabulary: int
) -> tuple[list[str], list[int]]:
    texts = [f"[PAD{number}]" for number in range(vocabulary)]
    kinds = [_UNUSED] * vocabulary
    entries = [(text, number, _NORMAL) for text, number in model["vocab"].items()]
    for token in added:
        kind = _CONTROL if token.get("special") else _USER_DEFINED
        entries.append((token["content"], token["id"], kind))
    for text, number, kind in entries:
        if type(number) is not int or not 0 <= number < vocabulary:
            raise InputError(
                f"{_FILE} numbers token {printable(text)} {number}, and the embedding has "
                f"{vocabulary} rows"
            )
        texts[number], kinds[number] = text, kind
    return texts, kinds


def _first_token(tokenizer: dict[str, Any]) -> str | None:
    """Return the special token that the post-processor puts first, if it does."""
    processor = tokenizer.get("post_processor")
    steps = processor.get("single") if isinstance(processor, dict) else None
    if isinstance(steps, list) and steps and "SpecialToken" in steps[0]:
        return str(steps[0]["SpecialToken"].get("id"))
    return None


def files(gguf: GGUFFile) -> tuple[CarriedFile, ...]:
    """Return the files; see `loraformat_converters.gguf.tokenizers.files`."""
    if gguf.text("tokenizer.ggml.model", "none") != "gpt2":
        return ()
    texts = gguf.array("tokenizer.ggml.tokens", ValueType.STRING)
    kinds = gguf.array("tokenizer.ggml.token_type", ValueType.INT32)
    merges = gguf.array("tokenizer.ggml.merges", ValueType.STRING)
    if gguf.text("tokenizer.ggml.pre", "default") != "gpt-2":
        return ()
    special = [n for n, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(texts[n], n, kinds[n] == _CONTROL) for n in special],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": _processor(gguf, texts),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {text: n for n, text in enumerate(texts) if kinds[n] != _UNUSED},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        number = gguf.integer(f"tokenizer.ggml.{key}_token_id", -1)
        if 0 <= number < len(texts):
            config[f"{name}_token"] = texts[number]
    return tuple(
        _carried(name, value)
        for name, value in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config))
    )


def _added(text: str, number: int, special: bool) -> dict[str, Any]:
    return {"id": number, "content": text, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": not special, "special": special}  # fmt: skip


def _processor(gguf: GGUFFile, texts: list[str]) -> dict[str, Any] | None:
    number = gguf.integer("tokenizer.ggml.bos_token_id", -1)
    if not gguf.flag("tokenizer.ggml.add_bos_token", False) or not 0 <= number < len(texts):
        return None
    text = texts[number]
    first = {"SpecialToken": {"id": text, "type_id": 0}}
    one = {"Sequence": {"id": "A", "type_id": 0}}
    two = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, first, two],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]}},
    }


def _carried(name: str, value: dict[str, Any]) -> CarriedFile:
    data = (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
    return CarriedFile(name, len(data), lambda: data)
