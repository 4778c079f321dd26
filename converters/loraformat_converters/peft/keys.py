"""The names of PEFT's tensors: which module, which part of it, and what the base calls it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from loraformat.checkpoint import LazyTensor

__all__ = ["PREFIX", "BaseNames", "Key", "parse_key"]

PREFIX = "base_model.model."

_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|base_layer|modules_to_save)(?=\.|$)")
_NESTED = re.compile(r"(?:\.base_layer)+(?=\.lora_)")
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)(\.default)?\.(?P<leaf>weight|bias)")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<part>A|B)(\.default)?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.default)?(\.weight)?")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.default)?")
#: What architectures, and versions of transformers, put before the layers.
_PLACES = re.compile(r"^(?:(?:model|language_model|transformer)\.)+")


class Key(NamedTuple):
    """What a stored tensor is.

    Attributes
    ----------
    owner : str
        The module; for a tensor that replaces the base's own, that tensor.
    part : str
        A, B, embedding_A, embedding_B, bias, magnitude, tokens, unknown, or "" for a replacement.
    depth : int
        How many wrappers of parameters lie around it: 0 is the outermost.
    """

    owner: str
    part: str
    depth: int = 0


def parse_key(name: str) -> Key:
    """Split the name of a stored tensor.

    Examples
    --------
    >>> parse_key("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
    Key(owner='model.layers.0.mlp.up_proj', part='A', depth=0)
    >>> parse_key("base_model.model.lm_head.modules_to_save.default.weight")
    Key(owner='lm_head.weight', part='', depth=0)
    >>> parse_key("base_model.model.h.experts.base_layer.lora_B.weight").depth
    1
    """
    nested = _NESTED.search(name)
    depth = nested[0].count("base_layer") if nested else 0
    bare = _WRAPPERS.sub("", name).lstrip(".").removeprefix(PREFIX)
    if match := _FACTOR.fullmatch(bare):
        if match["leaf"] == "weight":
            return Key(match["module"], match["part"], depth)
        return Key(match["module"], "bias" if match["part"] == "B" else "unknown", depth)
    if match := _EMBEDDING.fullmatch(bare):
        return Key(match["module"], f"embedding_{match['part']}")
    if match := _MAGNITUDE.fullmatch(bare):
        return Key(match["module"], "magnitude")
    if match := _TOKENS.fullmatch(bare):
        return Key(match["module"], "tokens")
    if "lora_" in bare or "trainable_tokens" in bare:
        return Key(bare, "unknown")
    return Key(bare.replace(".default.", "."), "")


class BaseNames:
    """Finds a base's tensor by the name that an adapter has for it.

    Versions of transformers put the layers of a language model at other places
    (``model.language_model.``, ``language_model.model.``), and checkpoints leave out a prefix
    or keep it. A name is found if it is there, or if one tensor alone ends alike.

    Examples
    --------
    >>> names = BaseNames({"model.language_model.layers.0.q.weight": None})
    >>> names.find("language_model.model.layers.0.q.weight")
    'model.language_model.layers.0.q.weight'
    >>> names.find("model.layers.1.q.weight") is None
    True
    """

    def __init__(self, tensors: Mapping[str, LazyTensor | None]) -> None:
        self._tensors = tensors
        self._bare: dict[str, list[str]] = {}
        self._tails: dict[str, list[str]] = {}
        for name in tensors:
            self._bare.setdefault(_PLACES.sub("", name), []).append(name)
            parts = name.split(".")
            for first in range(1, min(len(parts), 12)):
                self._tails.setdefault(".".join(parts[first:]), []).append(name)

    def find(self, name: str) -> str | None:
        """Return the base's name, or None."""
        if name in self._tensors:
            return name
        spellings = [name]
        if ".mlp." in name:  # transformers renames Mixtral's in memory
            spellings.append(name.replace(".mlp.", ".block_sparse_moe."))
        for spelling in spellings:
            bare = _PLACES.sub("", spelling)
            for alike in (self._bare.get(bare, []), self._tails.get(bare, [])):
                if len(alike) == 1:
                    return alike[0]
        return None
