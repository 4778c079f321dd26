"""The table of model families: experts, ``Conv1D``, heads, embeddings.

Everything here is a fact of transformers or of PEFT, kept as data so that neither is needed to
read an adapter; ``tests/adapters/test_families.py`` holds it against both. Everything else about
architectures is asked of transformers itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loraformat.families import plain_linears

__all__ = ["Family", "family_of", "model_type", "model_types"]

#: Linears are transformers' ``Conv1D``: weights of shape (in, out).
_CONV1D = {"gpt2", "openai-gpt", "decision_transformer", "imagegpt", "clvp"}

#: Fused experts lie as (experts, in, out), and their class says ``is_transposed``. Those of
#: Llama 4 lie so, too, but their class does not say it: to PEFT they are (experts, out, in).
_TRANSPOSED_EXPERTS = {"aria", "aria_text", "gpt_oss", "openai_privacy_filter"}

#: Experts had one tensor each, by these names, before transformers 5 fused them. PEFT takes every
#: module of such a model whose name ends in one of them for a part of the experts, the dense MLP
#: beside them included.
_LIKE_MIXTRAL = {"minimax", "minimax_m2", "mixtral"}
_LIKE_QWEN2_MOE = {
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1",
    "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe",
    "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe", "qwen3_moe",
    "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker",
    "solar_open",
}  # fmt: skip

#: Their class takes the embedding for the output head where the config does not say.
_TIED = {
    "aya_vision", "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt",
    "blenderbot", "blenderbot-small", "blip", "bloom", "camembert", "cohere", "cohere2",
    "cohere2_moe", "cohere2_vision", "cohere_compass_text", "cpmant", "ctrl", "data2vec-text",
    "deepseek_vl", "deepseek_vl_hybrid", "diffusion_gemma", "electra", "ernie", "ernie4_5",
    "ernie4_5_moe", "ernie4_5_vl_moe", "falcon", "falcon_mamba", "florence2", "gemma", "gemma2",
    "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified",
    "gemma4_unified_assistant", "gemma4_unified_text", "got_ocr2", "gpt-sw3", "gpt2", "gpt_bigcode",
    "gpt_neo", "gpt_neox_japanese", "granite_docling", "granite_swa", "hunyuan_vl",
    "hyperclovax_vision_v2", "internvl", "janus", "jetmoe", "kimi_k25", "kosmos-2", "kosmos-2.5",
    "lfm2", "lfm2_moe", "lfm2_vl", "lfm3", "lfm3_vl", "lighton_ocr", "mamba", "marian", "mbart",
    "megatron-bert", "minicpm3", "minicpm_ocr", "mistral3", "modernbert-decoder",
    "moss_transcribe_diarize", "mpt", "mvp", "openai-gpt", "opt", "ovis2", "paddleocr_vl",
    "paligemma", "pegasus", "plbart", "pp_chart2table", "prophetnet", "recurrent_gemma", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "shieldgemma2", "smollm3", "starcoder2",
    "t5gemma2", "trocr", "udop", "vaultgemma", "whisper", "xglm", "xlm", "xlm-roberta",
    "xlm-roberta-xl", "xlnet", "xmod", "youtu", "zamba", "zamba2", "zaya",
}  # fmt: skip

#: Linears that a state-space kernel multiplies by itself; PEFT does not adapt them.
_REFUSED = {"conv1d", "out_proj"}
_STATE_SPACE = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}

#: Linears whose weight the class around them multiplies by itself: PEFT's adapters of them change
#: nothing before they are merged. Of Zamba, parameters of a module that is called by keywords,
#: which PEFT's wrapper of parameters does not take.
_READ = {
    "falcon_mamba": {"dt_proj"},
    "jamba": {"dt_proj"},
    "longcat_flash": {"classifier"},
    "mamba": {"dt_proj"},
    "zamba": {"A_log", "dt_proj_weight", "x_proj_weight"},
}
#: Linears whose class computes more than a product, which PEFT adapts by their parameter only.
_OWN = {"deepseek_v4": {"o_a_proj"}}

#: Names of modules whose adapters PEFT only finds by another name in the file: it renames tensors
#: while loading as transformers does, and Laguna's pattern for the shared expert takes its plural,
#: the name in memory, for the singular on disk.
_PEFT_KEYS = {"laguna": (".mlp.shared_experts.", ".mlp.shared_expert.")}

#: A block that stands in several layers with the same weights.
_SHARED = {"zamba": "shared_transf", "zamba2": "shared_transformer"}

#: Their classes multiply and add norms, biases and routers as they are stored: in 4 bits such a
#: model runs only if all of its dense tensors are of one type.
_ONE_TYPE = {
    "bert", "bloom", "electra", "glm", "gpt2", "gpt_neox", "granite", "lfm2", "llama", "mistral",
    "mixtral", "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "roberta", "starcoder2",
}  # fmt: skip
#: Their classes cast what a norm returns, or have none with weights.
_CASTING = {
    "cohere", "falcon", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4",
    "gemma4_text", "nanochat", "nemotron", "olmo2", "stablelm",
}  # fmt: skip

#: A part that its class has, and that checkpoints may leave out: the class makes one of chance.
_OPTIONAL = {"bert": "pooler"}


@dataclass(frozen=True, slots=True)
class Family:
    """Weight layout of a model family, and how PEFT names its modules.

    Attributes
    ----------
    conv1d : bool
        Its linears are ``Conv1D``, whose weight is (in, out).
    transposed_experts : bool
        Its fused experts are (experts, in, out) instead of (experts, out, in).
    expert_leaves : frozenset of str
        Last parts of module names that PEFT takes for those of experts when they stand in
        ``target_modules``. A linear of such a name that is none can only be named in
        ``target_parameters``.
    tied : bool
        Its head is its embedding where the config does not say.
    one_type : bool or None
        Its dense tensors must all be of one type, or a model with 4-bit linears does not run;
        None where that is not known.
    optional : str or None
        A part that a checkpoint may leave out.
    refused_leaves : frozenset of str
        Last parts of module names that PEFT does not adapt.
    read_leaves : frozenset of str
        Last parts of names of linears beside which an adapter has no effect in PEFT, because the
        class around them reads their weight; and of parameters that PEFT cannot compute beside.
    own_leaves : frozenset of str
        Those of linears whose class computes more than a product: adapted as parameters.
    shared_block : str or None
        The part of a name below which several layers have the same weights: a delta of one would
        act in all of them, where PEFT adapts the one that it names.
    plain : tuple of str
        Parts of names of linears that transformers leaves dense in a model of 4-bit linears.
    foreign : tuple of str
        Those of weights that transformers cannot open in 4 bits, and that are quantized anyhow.
    heads : frozenset of str
        Output heads, if they are not ``lm_head``.
    renamed : tuple of (str, str)
        Parts of module names: in memory, and in the file of an adapter that PEFT opens.
    """

    conv1d: bool = False
    transposed_experts: bool = False
    expert_leaves: frozenset[str] = frozenset()
    tied: bool = False
    one_type: bool | None = None
    optional: str | None = None
    refused_leaves: frozenset[str] = frozenset()
    read_leaves: frozenset[str] = frozenset()
    own_leaves: frozenset[str] = frozenset()
    shared_block: str | None = None
    # Families do not differ to an adapter by these.
    plain: tuple[str, ...] = field(default=(), compare=False)
    foreign: tuple[str, ...] = field(default=(), compare=False)
    heads: frozenset[str] = field(default=frozenset(), compare=False)
    renamed: tuple[tuple[str, str], ...] = ()

    def is_shared(self, name: str) -> bool:
        """Tell whether a tensor is the weight of several layers.

        Examples
        --------
        >>> zamba2 = family_of({"model_type": "zamba2"})
        >>> zamba2.is_shared("model.layers.5.shared_transformer.self_attn.q_proj.weight")
        True
        >>> zamba2.is_shared("model.layers.5.linear.weight")
        False
        """
        return self.shared_block is not None and self.shared_block in name.split(".")

    def peft_key(self, name: str) -> str:
        """Return a name as PEFT writes it in adapter tensor keys."""
        for memory, stored in self.renamed:
            name = name.replace(memory, stored)
        return name

    def in_memory(self, name: str) -> str:
        """Return the transformers name for one in an adapter's tensor keys."""
        for memory, stored in self.renamed:
            name = name.replace(stored, memory)
        return name


def model_type(config: Mapping[str, Any]) -> str | None:
    """Return the config's ``model_type``; None if it is absent or not a string."""
    named = config.get("model_type")
    return named if isinstance(named, str) else None


def model_types(config: Mapping[str, Any]) -> list[str]:
    """Return the config's ``model_type`` and that of its language model.

    Examples
    --------
    >>> model_types({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}})
    ['llama4', 'llama4_text']
    """
    inner = config.get("text_config")
    found = [model_type(part) for part in (config, inner) if isinstance(part, Mapping)]
    return [one for one in found if one is not None]


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the facts of the model that a config describes.

    Examples
    --------
    >>> family_of({"model_type": "gpt_oss"}).transposed_experts
    True
    >>> sorted(family_of({"model_type": "mixtral"}).expert_leaves)
    ['gate', 'w1', 'w2', 'w3']
    >>> family_of({"model_type": "llama"}).conv1d, family_of({"model_type": "gpt2"}).conv1d
    (False, True)
    """
    types = set(model_types(config))
    leaves: set[str] = set()
    if types & _LIKE_MIXTRAL:
        leaves |= {"gate", "w1", "w2", "w3"}
    if types & _LIKE_QWEN2_MOE:
        leaves |= {"gate", "gate_proj", "up_proj", "down_proj"}
    return Family(
        conv1d=bool(types & _CONV1D),
        transposed_experts=bool(types & _TRANSPOSED_EXPERTS),
        expert_leaves=frozenset(leaves),
        one_type=True if types & _ONE_TYPE else False if types & _CASTING else None,
        optional=next((part for name, part in _OPTIONAL.items() if name in types), None),
        tied=any(config.get("model_type") == one for one in types & _TIED),  # not one inside
        refused_leaves=frozenset(_REFUSED if types & _STATE_SPACE else ()),
        read_leaves=_leaves(_READ, types),
        own_leaves=_leaves(_OWN, types),
        shared_block=next((part for name, part in _SHARED.items() if name in types), None),
        plain=plain_linears.plain_linears(sorted(types)),
        foreign=plain_linears.foreign_linears(sorted(types)),
        heads=plain_linears.heads(types),
        renamed=tuple(_PEFT_KEYS[one] for one in sorted(types & _PEFT_KEYS.keys())),
    )


def _leaves(table: Mapping[str, set[str]], types: set[str]) -> frozenset[str]:
    return frozenset(leaf for one in types for leaf in table.get(one, ()))
