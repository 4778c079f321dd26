"""The names of PEFT's tensors: which module, and which part of it."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["PREFIX", "Key", "parse_key"]

PREFIX = "base_model.model."

_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|base_layer|modules_to_save)(?=\.|$)")
_NESTED = re.compile(r"(?:\.base_layer)+(?=\.lora_)")
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)(\.default)?\.(?P<leaf>weight|bias)")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<part>A|B)(\.default)?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.default)?(\.weight)?")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.default)?")


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
