"""Parsing of PEFT tensor names.

PEFT takes an adapter's own name out of its tensors' names as it saves them. Whoever saves the
states of a model instead (a trainer that shards, ``torch.compile``) leaves it in, and what wraps
modules while they are trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from loraformat.errors import UnsupportedError, printable

__all__ = ["PREFIX", "Key", "adapter_in", "is_usual", "parse_key"]

PREFIX = "base_model.model."
#: Its adapter's name unless one is given; PEFT takes it in names, too.
_DEFAULT = "default"

#: What wraps a module while it is trained, and stays in names when its states are saved.
_TRAINING = re.compile(
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)(?=\.|$)"
)
#: PEFT's name of an adapter, which its own files do not have: it would look for it twice.
_LEFT_OVER = re.compile(rf"\.{_DEFAULT}(\.|$)")
_IN_PEFT = re.compile(r"(^|\.)(base_layer|modules_to_save|token_adapter(?=\.base_layer\.))(?=\.|$)")
_UNTRAINED = re.compile(r"(^|\.)original_module\.")
#: What holds the whole model: DistributedDataParallel, DeepSpeed, a LightningModule.
_HOLDERS = re.compile(rf"^(?:(?:module|model)\.)+(?={re.escape(PREFIX)})|^(?:module\.)+")
_NESTED = re.compile(r"(?:\.base_layer)+(?=\.lora_)")
_NAMED = re.compile(
    r"\.lora_(?:[AB]\.(?P<one>[^.]+)\.(?:weight|bias)|embedding_[AB]\.(?P<two>[^.]+))"
)


@lru_cache(maxsize=8)
def _patterns(adapter: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return what matches parts of a module, and an adapter's name in those of a replaced one."""
    name = rf"(?:\.{re.escape(adapter)})?"
    part = re.compile(
        rf"(?P<module>.+)\.(?:lora_(?P<factor>A|B){name}\.(?P<leaf>weight|bias)"
        rf"|lora_(?P<embedding>embedding_[AB]){name}"
        rf"|lora_(?P<magnitude>magnitude)_vector{name}(?:\.weight)?"
        rf"|token_adapter\.trainable_(?P<tokens>tokens)_delta{name})"
    )
    return part, re.compile(rf"(?<=\.modules_to_save)\.{re.escape(adapter)}(?=\.)")


class Key(NamedTuple):
    """Parsed name of a stored tensor.

    Attributes
    ----------
    owner : str
        The module; for a tensor that replaces the base's own, that tensor.
    part : str
        A, B, embedding_A, embedding_B, bias, magnitude, tokens, unknown, original (what a module
        of ``modules_to_save`` was before its training), or "" for a replacement.
    depth : int
        How many wrappers of parameters lie around it: 0 is the outermost.
    """

    owner: str
    part: str
    depth: int = 0


def adapter_in(names: Iterable[str]) -> str:
    """Return the adapter name in the keys of its tensors; several are refused.

    Examples
    --------
    >>> adapter_in(["q_proj.lora_A.polite.weight", "q_proj.lora_B.polite.weight"])
    'polite'
    >>> adapter_in(["q_proj.lora_A.weight"])
    'default'
    """
    matches = (_NAMED.search(name) for name in names)
    found = sorted({match["one"] or match["two"] for match in matches if match is not None})
    if len(found) > 1:
        raise UnsupportedError(
            f"holds the adapters {printable(', '.join(found))} in one file",
            hint="save them one by one: model.save_pretrained(OUT, selected_adapters=[NAME])",
        )
    return found[0] if found else _DEFAULT


def parse_key(name: str, adapter: str = _DEFAULT) -> Key:
    """Split the name of a stored tensor, which may contain its adapter's own (`adapter_in`).

    Examples
    --------
    >>> parse_key("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
    Key(owner='model.layers.0.mlp.up_proj', part='A', depth=0)
    >>> parse_key("base_model.model.lm_head.modules_to_save.default.weight")
    Key(owner='lm_head.weight', part='', depth=0)
    >>> parse_key("module._orig_mod.base_model.model.h.0.q.lora_A.polite.weight", "polite")
    Key(owner='h.0.q', part='A', depth=0)
    >>> parse_key("base_model.model.wte.token_adapter.base_layer.weight")
    Key(owner='wte.weight', part='', depth=0)
    >>> parse_key("base_model.model.h.experts.base_layer.lora_B.weight").depth
    1
    """
    part, replaced = _patterns(adapter)
    bare = _HOLDERS.sub("", _TRAINING.sub("", name).lstrip("."))
    bare = _IN_PEFT.sub("", replaced.sub("", bare)).lstrip(".").removeprefix(PREFIX)
    if match := part.fullmatch(bare):
        if match["factor"] is None:
            return Key(match["module"], match["embedding"] or match["magnitude"] or match["tokens"])
        nested = _NESTED.search(name)
        depth = nested[0].count("base_layer") if nested else 0
        of_bias = {"A": "unknown", "B": "bias"}  # A has none
        kind = match["factor"] if match["leaf"] == "weight" else of_bias[match["factor"]]
        return Key(match["module"], kind, depth)
    if "lora_" in bare or "trainable_tokens" in bare:
        return Key(bare, "unknown")
    if _UNTRAINED.search(bare):
        return Key(_UNTRAINED.sub(r"\1", bare), "original")
    return Key(bare, "")


def is_usual(name: str, adapter: str = _DEFAULT) -> bool:
    """Tell whether a name has the form that PEFT expects.

    Examples
    --------
    >>> is_usual("base_model.model.lm_head.lora_A.weight"), is_usual("lm_head.lora_A.weight")
    (True, False)
    >>> is_usual("base_model.model.lm_head.lora_A.default.weight")
    False
    """
    trained = _TRAINING.search(name) or _LEFT_OVER.search(name)
    return name.startswith(PREFIX) and adapter == _DEFAULT and not trained
