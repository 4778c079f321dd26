"""Roles of tensors by name and model type.

The core needs to know three things of an architecture: which weights are the linears of
its decoder layers (those are quantized), which of them are stored transposed (``Conv1D``),
and which module names must be named to peers as not quantized. All else about model
architectures is transformers' business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from loraformat.families.plain_linears import names_part
from loraformat.families.table import Family, family_of
from loraformat.families.tensor_names import layer_of
from loraformat.model.checkpoint import LazyTensor

__all__ = [
    "is_conv1d",
    "is_decoder_linear",
    "is_expert_stack",
    "is_matrix_weight",
    "is_one_expert",
    "is_plain_in_peers",
    "kind_of",
    "module_of",
    "skip_modules",
]

_CONV1D_MODULES = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)$")

#: Never quantized unless asked for: routers, experts (transformers fuses them into 3-D
#: parameters, which bitsandbytes leaves alone), embeddings, other towers than the decoder, the
#: weights of an indexer's heads (their class casts its input to the type of the weight).
_PLAIN = re.compile(
    r"(^|\.)("
    r"gate|router|router_gate|shared_expert_gate|experts|"
    r"\w*embed\w*|wte|wpe|\w*pos_emb|weights_proj|\w*norm\w*|ln_\w+|relative_attention_bias|"
    r"vision\w*|visual\w*|audio\w*|image\w*|lora_\w+"
    r")(\.|$)"
)

#: One parameter for all experts: its module is named for them, or it by what it does.
_EXPERT_STACK = re.compile(r"\.(shared_)?experts\.\w+(?<!_bias)$|\.(in|out)put_linear$")

_ONE_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")

_BIAS_OR_NORM = re.compile(r"bias$|(^|\.)(\w*norm\w*|ln_\w+)(\.weight)?$")

#: Parts of a model that see or hear, by the name of their module.
_TOWERS = {"vision_tower", "vision_model", "visual", "audio_tower"}
#: The layers of a language model inside a larger one; what precedes them is renamed in memory.
_LANGUAGE_MODEL = re.compile(r"(?:^|\.)language_model\.(?:model\.)?(\w+\.\d+\..+)$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)$")
_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe)$")
#: Linears behind an embedding.
_EMBEDDING_LINEAR = re.compile(r"embed\w*_(proj\w*|mapping\w*|transformation)$")
_FUSED = re.compile(r"(^|\.)(gate|router|experts)(\.|$)")
_ANY_FAMILY = Family()
#: Peers read the list as regular expressions: what is no module's name stays out of it.
_MODULE_NAME = re.compile(r"[\w.-]+", re.ASCII)


def module_of(name: str) -> str:
    """Return the module that owns a weight.

    Examples
    --------
    >>> module_of("model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj'
    """
    return name.removesuffix(".weight")


def is_decoder_linear(name: str, shape: tuple[int, ...], plain: Sequence[str] = ()) -> bool:
    """Tell whether a tensor is the weight of a linear inside a decoder layer.

    `plain` are parts of names that the model's family keeps dense.

    Examples
    --------
    >>> is_decoder_linear("model.layers.0.self_attn.q_proj.weight", (64, 64))
    True
    >>> is_decoder_linear("model.layers.0.block_sparse_moe.gate.weight", (8, 64))
    False
    >>> is_decoder_linear("lm_head.weight", (1000, 64))
    False
    """
    return (
        name.endswith(".weight")
        and len(shape) == 2
        and layer_of(name) is not None
        and not _PLAIN.search(module_of(name))
        and not names_part(module_of(name), plain)
    )


def is_expert_stack(name: str) -> bool:
    """Tell whether a tensor of three dimensions is a projection of all experts of a layer.

    Examples
    --------
    >>> is_expert_stack("model.layers.0.mlp.experts.gate_up_proj")
    True
    >>> is_expert_stack("model.layers.0.block_sparse_moe.input_linear.weight")  # Granite on disk
    True
    >>> is_expert_stack("model.layers.0.mamba.conv1d.weight")
    False
    """
    return layer_of(name) is not None and bool(_EXPERT_STACK.search(module_of(name)))


def is_one_expert(name: str) -> bool:
    """Tell whether a tensor of two dimensions is a projection of one expert of a layer.

    Examples
    --------
    >>> is_one_expert("model.layers.0.mlp.experts.7.gate_proj.weight")
    True
    """
    return layer_of(name) is not None and bool(_ONE_EXPERT.search(name))


def is_matrix_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor is a weight matrix, not a bias or a norm.

    Examples
    --------
    >>> is_matrix_weight("lm_head.weight", (1000, 64))
    True
    >>> is_matrix_weight("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 64))
    False
    """
    return len(shape) == 2 and not _BIAS_OR_NORM.search(name)


def is_conv1d(name: str, model_type: str | None) -> bool:
    """Tell whether a weight is stored as (in, out), as transformers' ``Conv1D`` does.

    Examples
    --------
    >>> is_conv1d("transformer.h.0.attn.c_attn.weight", "gpt2")
    True
    """
    conv1d = family_of({"model_type": model_type}).conv1d
    return conv1d and bool(_CONV1D_MODULES.search(module_of(name)))


def is_plain_in_peers(name: str, plain: Sequence[str] = ()) -> bool:
    """Tell whether transformers has no 4-bit module for a weight: an embedding, router or expert.

    `plain` are parts of names that its family leaves dense.

    Examples
    --------
    >>> is_plain_in_peers("model.embed_tokens.weight"), is_plain_in_peers("lm_head.weight")
    (True, False)
    """
    module = module_of(name)
    return bool(_EMBEDDING.search(module) or _FUSED.search(module)) or names_part(module, plain)


def kind_of(name: str) -> str:
    """Return the kind of layer a weight belongs to: its module's own name.

    Examples
    --------
    >>> kind_of("model.layers.7.mlp.up_proj.weight"), kind_of("h.0.mlp.experts.3.w1.weight")
    ('up_proj', 'w1')
    """
    return module_of(name).rsplit(".", 1)[-1]


def skip_modules(
    dense: Iterable[LazyTensor], quantized: Iterable[str], family: Family = _ANY_FAMILY
) -> list[str] | None:
    """Return the modules for ``llm_int8_skip_modules``, which peers do not quantize.

    transformers replaces every linear by a 4-bit one unless its name matches an entry of this list,
    at its end or, as a regular expression, at its start; without a list it leaves the output head
    alone. Routers, experts and whole towers are named by one name part, which keeps the list short;
    any other plain linear is named in full.

    `dense` are the tensors that are not quantized, `quantized` the names of the weights that are;
    the family knows a part that the checkpoint may lack, and a head that it may not name: they have
    no 4-bit form, then. None if transformers' own default says the same.

    Examples
    --------
    >>> skip_modules([], ["model.layers.0.mlp.up_proj.weight"]) is None
    True
    >>> skip_modules([], ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
    []
    """
    modules = {module_of(name) for name in quantized}
    heads, names = {"lm_head", *family.heads}, set[str]()
    for tensor in dense:
        module = module_of(tensor.name)
        if module == tensor.name or len(tensor.shape) != 2 or not _MODULE_NAME.fullmatch(module):
            continue
        if _HEAD.search(module):
            heads.add(module)
        elif names_part(module, family.plain):
            continue
        elif not _EMBEDDING.search(module) or _may_be_linear(module):
            names |= _patterns(module, modules)
    # By these short names: in memory transformers may spell the rest otherwise.
    names |= {part for part in family.plain if not _matches(part, modules)}
    absent = family.optional
    if absent is not None and not any(absent in module.split(".") for module in modules):
        names.add(absent)
    if any(_HEAD.search(module) for module in modules):
        return sorted(names)
    return sorted(names | heads) if names else None


def _patterns(module: str, quantized: set[str]) -> set[str]:
    """Return short patterns for a module that match no quantized module."""
    for candidates in _candidates(module):
        if not any(_matches(pattern, quantized) for pattern in candidates):
            return candidates
    return {module}


def _may_be_linear(embedding: str) -> bool:
    return layer_of(embedding) is not None or bool(_EMBEDDING_LINEAR.search(embedding))


def _matches(pattern: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(pattern) or name.endswith(pattern) for name in modules)


def _candidates(module: str) -> Iterator[set[str]]:
    parts = module.split(".")
    if "experts" in parts and "router" not in parts:
        yield {"experts"}
    elif parts[-1] == "gate":
        yield {"gate"}
    for tower in _TOWERS.intersection(parts):
        # In memory transformers puts towers below "model", whatever the checkpoint does.
        yield {".".join(parts[: parts.index(tower) + 1]), f"model.{tower}"}
    if renamed := _LANGUAGE_MODEL.search(module):
        yield {module, renamed[1]}
