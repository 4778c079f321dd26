"""The names of PEFT's tensors: which module, which part of it."""

from __future__ import annotations

import re

__all__ = ["PREFIX", "Key", "parse_key"]

PREFIX = "base_model.model."

_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|base_layer|modules_to_save)(?=\.|$)")
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)(\.default)?\.(?P<leaf>weight|bias)")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<part>A|B)(\.default)?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.default)?(\.weight)?")

#: Module and part: A, B, embedding_A, embedding_B, bias, magnitude, unknown, or "" for a tensor
#: that replaces the base's own.
Key = tuple[str, str]


def parse_key(name: str) -> Key:
    """Split the name of a stored tensor.

    Examples
    --------
    >>> parse_key("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
    ('model.layers.0.mlp.up_proj', 'A')
    >>> parse_key("base_model.model.lm_head.modules_to_save.default.weight")
    ('lm_head.weight', '')
    """
    bare = _WRAPPERS.sub("", name).lstrip(".").removeprefix(PREFIX)
    if match := _FACTOR.fullmatch(bare):
        if match["leaf"] == "weight":
            return match["module"], match["part"]
        return match["module"], "bias" if match["part"] == "B" else "unknown"
    if match := _EMBEDDING.fullmatch(bare):
        return match["module"], f"embedding_{match['part']}"
    if match := _MAGNITUDE.fullmatch(bare):
        return match["module"], "magnitude"
    if "lora_" in bare or "trainable_tokens" in bare:
        return bare, "unknown"
    return bare.replace(".default.", "."), ""
