"""Rules about adapter methods other than plain LoRA."""

from __future__ import annotations

from loraformat.errors import printable
from loraformat.model.adapter_facts import AdapterFacts
from loraformat.runtimes.record import Rule, Runtime, refuses

__all__ = ["METHOD_RULES"]


def _method(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if adapter.refusal is None or adapter.init is not None:
        return None
    hint = f" ({adapter.refusal_hint})" if adapter.refusal_hint else ""
    return adapter.refusal + hint


def _init(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if adapter.init is None:
        return None
    return f"init_lora_weights is {printable(adapter.init)}: the factors belong to a modified base"


def _alora(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    return "is an aLoRA, active only after certain tokens" if adapter.invocation_tokens else None


def _dora(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    return "uses DoRA, which rescales the merged weights" if adapter.dora else None


def _bias(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    return "contains trained biases" if adapter.bias else None


def _modules_to_save(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    names = [name for name in adapter.replaced if not name.endswith(".bias")]
    names = [n for n in names if n.removesuffix(".weight").rpartition(".")[2] not in
             runtime.replaces]  # fmt: skip
    if not names:
        return None
    return f"replaces {len(names)} whole tensors ({printable(names[0])}, ...)"


def _classifier(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    leaves = {name.removesuffix(".weight").rpartition(".")[2] for name in adapter.replaced}
    named = sorted(leaves & {"score", "classifier"})
    return f"brings a {named[0]} of its own (a classifier)" if named else None


def _tokens(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    return f"replaces rows of {printable(adapter.rows[0])}" if adapter.rows else None


METHOD_RULES = (
    Rule(
        "METHOD",
        "a method other than LoRA, or a field that changes the meaning of the factors",
        _method,
        refuses("it is not a sum of a base and low-rank deltas", "advice"),
    ),
    Rule("INIT_MUTATES_BASE", "PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ: a modified base", _init),
    Rule("ALORA", "`alora_invocation_tokens`", _alora),
    Rule("DORA", "`use_dora`", _dora),
    Rule("BIAS", "`bias`, `lora_bias`", _bias),
    Rule("MODULES_TO_SAVE", "`modules_to_save`, saved embeddings", _modules_to_save),
    Rule("CLASSIFIER", "a trained `score` or `classifier`", _classifier),
    Rule("TRAINED_TOKENS", "`trainable_token_indices`", _tokens),
)
