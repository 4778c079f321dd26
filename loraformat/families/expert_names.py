"""Names of experts and routers: tensors on disk and parameters in memory.

Checkpoints have one tensor for each linear of each expert, transformers 5 has one parameter for
all of them; Mixtral and its kin also move the block around them. Facts of transformers, held
against it by ``tests/adapters/test_families.py``; where a base's ``config.json`` is known,
`loraformat.model.base_names` asks transformers itself first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = [
    "EXPERT_LEAVES",
    "fused_experts",
    "is_router",
    "parameter_order",
    "spelled_in_memory",
    "spelled_on_disk",
]

#: The leaves of the experts' own tensors on disk, by the fused parameter that transformers makes
#: of them, in the order of its rows.
EXPERT_LEAVES: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
}

_ROUTERS = {"gate", "router"}
_ONE_EXPERT = re.compile(r"(.+\.experts)\.(\d{1,9})\.(\w+)\.weight")

#: Matrices that one module holds as parameters, in the order of its class. PEFT wraps the module
#: for one after the other, and no name in a file says for which: the order decides.
_PARAMETERS = (
    "gate_proj", "up_proj", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias",
    "x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D",  # zamba
    "w1", "v1", "w2",  # dbrx
    "input_gate_weight", "input_gate_bias", "recurrent_gate_weight", "recurrent_gate_bias",
    "time_mix_key", "time_mix_value", "time_mix_receptance",  # rwkv
    "rel_pos_h", "rel_pos_w",  # got_ocr2
    "global_img_feature_extensor", "sub_img_feature_extensor", "b1", "b2",  # phi4_multimodal
    "q", "k", "v", "o", "r", "r_r_bias", "r_s_bias", "r_w_bias", "seg_embed",  # xlnet
)  # fmt: skip

_ON_DISK = re.compile(r"\.block_sparse_moe\.(?=(?:gate|experts|shared_experts)(?:\.|$))")
_IN_MEMORY = re.compile(r"\.mlp\.(?=(?:gate|experts|shared_experts)(?:\.|$))")


def fused_experts(names: Iterable[str]) -> dict[str, list[list[str]]] | None:
    """Return by fused parameter, in memory, and by expert the tensors that make its rows.

    None if there are no experts one by one, if one lacks a linear that another has, or if their
    linears have names that are not known.

    Examples
    --------
    >>> fused_experts(["h.experts.1.w2.weight", "h.experts.0.w2.weight"])
    {'h.experts.down_proj': [['h.experts.0.w2.weight'], ['h.experts.1.w2.weight']]}
    >>> fused_experts(["h.experts.1.w2.weight"]) is None
    True
    """
    homes: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if (match := _ONE_EXPERT.fullmatch(name)) is not None:
            homes.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    found = {}
    for home, experts in homes.items():
        left = set(experts.get(0, ()))
        if len(experts) != max(experts) + 1 or any(one != left for one in experts.values()):
            return None
        for parameter, spellings in EXPERT_LEAVES.items():
            leaves = next((one for one in spellings if left.issuperset(one)), ())
            left.difference_update(leaves)
            if leaves:
                found[f"{spelled_in_memory(home)}.{parameter}"] = [
                    [f"{home}.{number}.{leaf}.weight" for leaf in leaves]
                    for number in range(len(experts))
                ]
        if left:
            return None
    return found or None


def is_router(module: str) -> bool:
    """Tell by its name whether a module is a router.

    transformers 5 computes most routers from a parameter and not from a linear: an adapter of
    one names its weight.

    Examples
    --------
    >>> is_router("model.layers.0.mlp.gate"), is_router("model.layers.0.mlp.gate_proj")
    (True, False)
    """
    return module.rpartition(".")[2] in _ROUTERS


def parameter_order(names: Sequence[str]) -> list[str] | None:
    """Return parameters in the order of their module; None if unknown.

    Examples
    --------
    >>> parameter_order(["down_proj", "gate_up_proj"])
    ['gate_up_proj', 'down_proj']
    """
    if not all(name in _PARAMETERS for name in names):
        return list(names) if len(names) == 1 else None
    return sorted(names, key=_PARAMETERS.index)


def spelled_in_memory(name: str) -> str:
    """Return transformers' in-memory name of a Mixtral tensor.

    Examples
    --------
    >>> spelled_in_memory("model.layers.0.block_sparse_moe.gate.weight")
    'model.layers.0.mlp.gate.weight'
    >>> spelled_in_memory("model.layers.0.block_sparse_moe.input_linear.weight")  # GraniteMoE's
    'model.layers.0.block_sparse_moe.input_linear.weight'
    """
    return _ON_DISK.sub(".mlp.", name)


def spelled_on_disk(name: str) -> str:
    """Return the checkpoint name of a Mixtral tensor in memory.

    Examples
    --------
    >>> spelled_on_disk("model.layers.0.mlp.gate.weight")
    'model.layers.0.block_sparse_moe.gate.weight'
    >>> spelled_on_disk("model.layers.0.mlp.gate_proj.weight")
    'model.layers.0.mlp.gate_proj.weight'
    """
    return _IN_MEMORY.sub(".block_sparse_moe.", name)
