"""Rules that compare an adapter with its base, and about loading it there in PEFT."""

from __future__ import annotations

from loraformat.errors import printable
from loraformat.model.adapter_facts import AdapterFacts, ModuleFacts
from loraformat.model.base_match import BaseMatch
from loraformat.model.expert_layouts import is_of_one_expert
from loraformat.runtimes.record import Rule, Runtime, caution, differs, refuses, unknown

__all__ = ["BASE_RULES", "LOADING_RULES"]

_GROW = (
    "it was trained on a base with more tokens: grow the base with transformers "
    "(model.resize_token_embeddings, save_pretrained), and name that one"
)
_HEADS = ("lm_head", "embed_tokens", "wte", "embed_out")


def _held(adapter: AdapterFacts) -> list[ModuleFacts]:
    """Return the modules that can be looked up in the base, without fused experts."""
    if adapter.base is None or not adapter.base.named:
        return []
    tied = adapter.base.tied
    return [
        m for m in adapter.modules
        if not (m.experts or (tied and m.leaf in _HEADS))
        # a bundle has stacks of experts, of which these are parts
        and not (m.base_shape is None and adapter.base.single_experts
                 and is_of_one_expert(f"{m.name}."))
    ]  # fmt: skip


def _unknown(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    missing = [module.name for module in _held(adapter) if module.base_shape is None]
    if not missing or runtime.has_proof(adapter):
        return None
    return f"the base has none of {len(missing)} modules ({printable(missing[0])}, ...)"


def _shape(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if adapter.empty or runtime.has_proof(adapter):
        return None
    for module in _held(adapter):
        linear = (module.out_features, module.in_features)
        if module.missing or module.base_shape in (None, linear, linear[::-1]):
            continue
        if _tokens_of(module) is not None:
            continue
        assert module.base_shape is not None
        return (
            f"the delta of {printable(module.name)} is {list(linear)}, the base's weight "
            f"{list(module.base_shape)}"
        )
    return None


def _tokens_of(module: ModuleFacts) -> int | None:
    """Return the delta's vocabulary size, if only that differs from the base's weight."""
    if module.leaf not in _HEADS or module.base_shape is None or module.missing:
        return None
    sizes = module.out_features, module.in_features
    tokens, width = sizes[::-1] if module.embedding else sizes
    rows, *columns = module.base_shape
    return tokens if columns == [width] and tokens != rows else None


def _vocabulary(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if adapter.base is None or runtime.has_proof(adapter):
        return None
    for module in adapter.modules:
        if (tokens := _tokens_of(module)) is not None and module.base_shape is not None:
            return (
                f"{printable(module.name)} has a delta of {tokens} tokens, and the base has "
                f"{module.base_shape[0]}"
            )
    return None


def _beyond(adapter: AdapterFacts) -> str | None:
    """Return the problem with rows for tokens that the base lacks; None if there is none.

    Where the adapter has the embedding, too, it says how many tokens there are.
    """
    here = adapter.base.tokens if adapter.base is not None else None
    if here is None or adapter.last_token is None or adapter.last_token < here:
        return None
    saved = any(name.removesuffix(".weight").endswith(_HEADS) for name in adapter.replaced)
    if saved or any(_tokens_of(module) is not None for module in adapter.modules):
        return None
    return f"has a row for token {adapter.last_token}, and the base has {here}"


def _fingerprint(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    here = adapter.base.fingerprint if adapter.base is not None else None
    match = BaseMatch(adapter.base_fingerprint, here)
    return match.difference if match.relation == "other" else None


def _revision(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if adapter.base is None or (adapter.base_fingerprint and adapter.base.fingerprint):
        return None  # nobody knows, or the weights themselves say
    made_for, here = adapter.base_commit, adapter.base.commit
    if made_for is None or here is None or made_for == here:
        return None
    return f"was made for the base at commit {made_for[:12]}, and this one is at {here[:12]}"


def _tied(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    changed = sorted(leaf for leaf in adapter.leaves if leaf in _HEADS)
    if adapter.base is None or not adapter.base.tied or not changed:
        return None
    return f"changes {', '.join(changed)}, and the base's head is its embedding"


def _shared(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    block = adapter.base.shared_block if adapter.base is not None else None
    changed = [module.name for module in adapter.modules if block in module.name.split(".")]
    if block is None or not changed:
        return None
    return f"changes {printable(changed[0])}, a weight of several layers"


def _architecture(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    here = adapter.base.gguf_architecture if adapter.base is not None else None
    if here is None:
        return None
    if adapter.architecture is not None:  # a GGUF file
        if adapter.architecture == here:
            return None
        return f"is for {printable(adapter.architecture)}, and the base is {here}"
    if not runtime.imports or here in runtime.imports:
        return None
    return f"is for {here}"


def _rows(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if adapter.format != "peft" or not adapter.leaves & {"q_proj", "k_proj"}:
        return None
    here = adapter.base.gguf_architecture if adapter.base is not None else None
    if here not in (None, "llama"):
        return None
    return "changes q_proj or k_proj" + ("" if here else " of what may be a llama model")


BASE_RULES = (
    Rule(
        "TARGET_UNKNOWN",
        "modules that the base lacks",
        _unknown,
        refuses("there is no weight to add it to", "other-base"),
    ),
    Rule(
        "SHAPE_VS_BASE",
        "deltas whose shapes differ from the base's weights",
        _shape,
        refuses("it cannot be added", "other-base"),
    ),
    Rule(
        "VOCABULARY",
        "deltas for another vocabulary size",
        _vocabulary,
        refuses("it uses the base's vocabulary", "merge"),
    ),
    Rule(
        "TOKENS_BEYOND",
        "rows for tokens that the base lacks",
        lambda adapter, _: _beyond(adapter),
        refuses("there are no such rows", "advice", _GROW),
    ),
    Rule(
        "BASE_HASH_MISMATCH",
        "the fingerprint of another base",
        _fingerprint,
        differs("it may not work on this base", "other-base"),
    ),
    Rule(
        "BASE_REVISION",
        "another commit of the base",
        _revision,
        caution("the weights may differ", "advice", "load the base at that commit"),
    ),
    Rule("TIED_HEAD", "a delta of a tied head or embedding", _tied),
    Rule(
        "SHARED_BLOCK",
        "a delta of a weight that several layers share",
        _shared,
        unknown(
            "the delta is that of one layer; whether the others stay as they were was not looked "
            "at",
            "advice",
            "run it with transformers and PEFT",
        ),
    ),
    Rule("ARCHITECTURE", "an unsupported architecture", _architecture),
    Rule("ROW_ORDER", "Q and K of llama models", _rows),
)


def _loaded(adapter: AdapterFacts) -> dict[str, str]:
    """Return what happens when PEFT loads an adapter, by the rule under which it falls."""
    loading = adapter.loading
    if loading is None:
        return {}
    if loading.problem is None:
        left_out = {"LOAD_IGNORES": loading.ignored, "LOAD_UNKNOWN": loading.unknown}
        total = len(loading.ignored) + len(loading.unknown) + loading.taken
        return {
            rule: f"{len(names)} of {total} tensors match nothing in this base "
            f"({printable(names[0])})"
            for rule, names in left_out.items()
            if names
        }
    if adapter.empty or _beyond(adapter) is not None:  # these rules explain the error better
        return {}
    problem = printable(loading.problem)
    if loading.fits:
        return {"LOAD_FAILS": f"does not load, though its tensors fit this base: {problem}"}
    if loading.vocabularies is not None:
        there, here = loading.vocabularies
        return {"LOAD_RESIZED": f"is for {there} tokens, and this base has {here}: {problem}"}
    return {"LOAD_OTHER_BASE": f"does not load into this base: {problem}"}


def _loading_rule(name: str, about: str) -> Rule:
    return Rule(name, about, lambda adapter, _: _loaded(adapter).get(name))


def _foreign(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if not adapter.foreign:
        return None
    return f"calls {len(adapter.foreign)} modules differently ({printable(adapter.foreign[0])})"


def _unproven(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if adapter.loading is None or adapter.loading.proven:
        return None
    return "was not loaded by PEFT itself; only names and shapes were checked"


LOADING_RULES = (
    _loading_rule("LOAD_FAILS", "a config that does not match its tensors in PEFT"),
    _loading_rule("LOAD_RESIZED", "a vocabulary other than the base's"),
    _loading_rule("LOAD_OTHER_BASE", "tensors that PEFT cannot load into the base's shapes"),
    _loading_rule("LOAD_IGNORES", "tensors under names that PEFT does not recognise"),
    _loading_rule("LOAD_UNKNOWN", "tensors that match nothing in the base"),
    Rule("FOREIGN_NAMES", "modules under the names of another version of transformers", _foreign),
    Rule("LOAD_UNPROVEN", "PEFT or transformers is missing or does not know the base", _unproven),
)
