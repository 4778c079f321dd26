"""What a tensor's name and the model type say about it.

The core needs to know three things of an architecture: which weights are the linears of
its decoder layers (those are quantized), which of them are stored transposed (``Conv1D``),
and which module names must be named to peers as not quantized. All else about model
architectures is transformers' business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from loraformat.checkpoint import LazyTensor
from loraformat.layout import layer_of

__all__ = ["is_conv1d", "is_decoder_linear", "kind_of", "module_of", "skip_modules"]

#: Model types whose linears are transformers' ``Conv1D``: weights of shape (in, out).
_CONV1D_TYPES = {"gpt2", "openai-gpt", "decision_transformer", "imagegpt", "clvp"}
_CONV1D_MODULES = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)$")

#: Never quantized unless asked for: routers, experts (transformers fuses them into 3-D
#: parameters, which bitsandbytes leaves alone), embeddings, other towers than the decoder.
_PLAIN = re.compile(
    r"(^|\.)("
    r"gate|router|shared_expert_gate|experts|"
    r"\w*embed\w*|wte|wpe|\w*norm\w*|ln_\w+|relative_attention_bias|"
    r"vision\w*|visual\w*|audio\w*|image\w*|lora_\w+"
    r")(\.|$)"
)


def module_of(name: str) -> str:
    """Return the module that owns a weight.

    Examples
    --------
    >>> module_of("model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj'
    """
    return name.removesuffix(".weight")


def is_decoder_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor is the weight of a linear inside a decoder layer.

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
    )


def is_conv1d(name: str, model_type: str | None) -> bool:
    """Tell whether a weight is stored as (in, out), as transformers' ``Conv1D`` does.

    Examples
    --------
    >>> is_conv1d("transformer.h.0.attn.c_attn.weight", "gpt2")
    True
    """
    return model_type in _CONV1D_TYPES and bool(_CONV1D_MODULES.search(module_of(name)))


def kind_of(name: str) -> str:
    """Return the kind of layer a weight belongs to: its module's own name.

    Examples
    --------
    >>> kind_of("model.layers.7.mlp.up_proj.weight"), kind_of("h.0.mlp.experts.3.w1.weight")
    ('up_proj', 'w1')
    """
    return module_of(name).rsplit(".", 1)[-1]


def skip_modules(dense: Iterable[LazyTensor], quantized: Iterable[str]) -> list[str] | None:
    """Return what peers must be told not to quantize, for ``llm_int8_skip_modules``.

    transformers replaces every linear by a 4-bit one unless its name matches an entry of
    this list at its start or end; without a list it leaves the output head alone. Routers
    and experts are named by their last or second-to-last name part, which keeps the list
    short; any other plain linear is named in full.

    Parameters
    ----------
    dense : iterable of LazyTensor
        The tensors that are not quantized.
    quantized : iterable of str
        Names of the weights that are.

    Returns
    -------
    list of str or None
        None if transformers' own default says the same.

    Examples
    --------
    >>> skip_modules([], ["model.layers.0.mlp.up_proj.weight"]) is None
    True
    """
    modules = {module_of(name) for name in quantized}
    names: set[str] = set()
    for tensor in dense:
        if not tensor.name.endswith(".weight") or len(tensor.shape) != 2:
            continue
        module = module_of(tensor.name)
        if re.search(r"(^|\.)(\w*embed\w*|wte|wpe|lm_head)$", module):
            continue
        names.add(_shortest(module, modules))
    return sorted(names | {"lm_head"}) if names else None


def _shortest(module: str, quantized: set[str]) -> str:
    """Return a short pattern for a module that matches none of the quantized ones."""
    parts = module.split(".")
    candidates = ["experts"] if "experts" in parts else [parts[-1]] if parts[-1] == "gate" else []
    for tower in ("vision_tower", "vision_model", "visual", "audio_tower"):
        if tower in parts:
            candidates.append(".".join(parts[: parts.index(tower) + 1]))
    for candidate in candidates:
        if not any(name.endswith(candidate) or name.startswith(candidate) for name in quantized):
            return candidate
    return module
