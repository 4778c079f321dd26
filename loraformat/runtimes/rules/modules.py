"""Rules about which modules are adapted."""

from __future__ import annotations

from loraformat.errors import printable
from loraformat.families.tensor_names import layer_of, type_of
from loraformat.model.adapter_facts import AdapterFacts, ModuleFacts
from loraformat.model.expert_layouts import is_of_one_expert
from loraformat.runtimes.record import Rule, Runtime, differs

__all__ = ["MODULE_RULES"]

_CONV1D = {"c_attn", "c_proj", "c_fc", "q_attn"}
_CONV1D_TYPES = {None, "gpt2", "openai-gpt"}


def _pair(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    halves = [module for module in adapter.modules if module.missing]
    if not halves:
        return None
    return f"{len(halves)} modules lack A or B ({printable(halves[0].name)}: {halves[0].missing})"


def _coupled(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    names = {module.name for module in adapter.modules}
    for one, other in runtime.couples:
        for name in sorted(names):
            stem, _, leaf = name.rpartition(".")
            if leaf == one and f"{stem}.{other}" not in names:
                return f"{printable(name)} has a delta, and {other} beside it has none"
    return None


def _types(adapter: AdapterFacts) -> dict[str, set[int]]:
    """Return the layers in which each type of module is adapted."""
    found: dict[str, set[int]] = {}
    for module in adapter.modules:
        if (layer := layer_of(module.name)) is not None:
            found.setdefault(type_of(module.name), set()).add(layer[1])
    return found


def _layers(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    types = _types(adapter)
    if not runtime.whole_types or not types:
        return None
    known = adapter.base.layers if adapter.base is not None else None
    count = known or 1 + max(max(layers) for layers in types.values())
    for kind, layers in sorted(types.items()):
        missing = set(range(count)) - layers
        if missing:
            leaf = printable(kind.rpartition(".")[2])
            return f"{leaf} has a delta in {len(layers)} of {count} layers"
    return None


def _conv1d(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    model_type = adapter.base.model_type if adapter.base is not None else None
    named = sorted(adapter.leaves & _CONV1D)
    if adapter.format != "peft" or not named or model_type not in _CONV1D_TYPES:
        return None
    return f"{', '.join(named)} are Conv1D, whose weights are stored as (in, out)"


def _embedding(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    names = [module.name for module in adapter.modules if module.embedding]
    return f"changes the embedding {printable(names[0])}" if names else None


def _is_stack(module: ModuleFacts) -> bool:
    """Tell whether a module is a linear of all experts: ``experts.w1``."""
    return module.experts > 0 and module.name.rpartition(".")[0].endswith(".experts")


def _fused(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    """Return what adapts fused experts that the runtime does not keep fused."""
    experts = [
        module
        for module in adapter.modules
        if (module.experts > 1 or module.name.endswith(".experts")) and not _is_stack(module)
    ]
    model_type = adapter.base.model_type if adapter.base is not None else None
    if not experts or adapter.format != "peft" or model_type in runtime.fused_experts:
        return None
    return f"adapts fused experts ({printable(experts[0].name)}; target_parameters)"


def _moe(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    only_fused = adapter.base is not None and not adapter.base.single_experts
    return None if only_fused else _fused(adapter, runtime)


def _moe_only_fused(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    only_fused = adapter.base is not None and not adapter.base.single_experts
    found = _fused(adapter, runtime) if only_fused else None
    return None if found is None else f"{found}, and checkpoints of the base have no others"


def _each(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    names = [module.name for module in adapter.modules if is_of_one_expert(f"{module.name}.")]
    model_type = adapter.base.model_type if adapter.base is not None else None
    fused = not runtime.fused_experts or model_type in runtime.fused_experts
    if not names or adapter.format != "peft" or not fused:
        return None
    return f"has a LoRA for each expert ({printable(names[0])})"


def _stacks(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    named = adapter.modules if adapter.format == "peft" else ()
    names = [module.name for module in named if _is_stack(module)]
    return f"adapts all experts at once ({printable(names[0])})" if names else None


MODULE_RULES = (
    Rule(
        "PAIR_MISSING",
        "a module with only one of A and B",
        _pair,
        differs("the delta is lost: loaders reject it or reinitialise the missing factor", "advice",
                "save it again where it was trained"),
    ),
    Rule("QV_COUPLED", "`q_proj` without `v_proj`", _coupled),
    Rule("LAYERS_MISSING", "a module type that is adapted in some layers only", _layers),
    Rule("EMBEDDING", "a delta of an embedding", _embedding),
    Rule("CONV1D", "GPT-2's `Conv1D`", _conv1d),
    Rule("MOE", "fused experts (`target_parameters`)", _moe),
    Rule("MOE_ONLY_FUSED", "fused experts of a base whose checkpoints have no others",
         _moe_only_fused),
    Rule("EXPERTS_EACH", "a LoRA for each expert, where experts are fused or unknown", _each),
    Rule("EXPERTS_STACKED", "stacks `experts.w1`, `w2`, `w3` of three dimensions", _stacks),
)  # fmt: skip
