"""Rules about loading an adapter in PEFT."""

from __future__ import annotations

from loraformat.errors import printable
from loraformat.model.adapter_facts import AdapterFacts, Loading
from loraformat.runtimes.record import Rule, Runtime
from loraformat.runtimes.rules.base import tokens_beyond

__all__ = ["LOADING_RULES"]


def _problem(adapter: AdapterFacts) -> str | None:
    """Return PEFT's error, unless another rule explains it better."""
    if adapter.loading is None or adapter.loading.problem is None or adapter.empty:
        return None
    return None if tokens_beyond(adapter) is not None else printable(adapter.loading.problem)


def _fails(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    problem, loading = _problem(adapter), adapter.loading
    if problem is None or loading is None or not loading.fits:
        return None
    return f"does not load, though its tensors fit this base: {problem}"


def _resized(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    problem, loading = _problem(adapter), adapter.loading
    if problem is None or loading is None or loading.vocabularies is None:
        return None
    there, here = loading.vocabularies
    return f"is for {there} tokens, and this base has {here}: {problem}"


def _other(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    problem, loading = _problem(adapter), adapter.loading
    if problem is None or loading is None or loading.fits or loading.vocabularies is not None:
        return None
    return f"does not load into this base: {problem}"


def _ignores(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if adapter.loading is None or adapter.loading.problem is not None:
        return None
    return _left_out(adapter.loading, adapter.loading.ignored)


def _unknown(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if adapter.loading is None or adapter.loading.problem is not None:
        return None
    return _left_out(adapter.loading, adapter.loading.unknown)


def _left_out(loading: Loading, names: tuple[str, ...]) -> str | None:
    if not names:
        return None
    total = len(loading.ignored) + len(loading.unknown) + loading.taken
    return f"{len(names)} of {total} tensors match nothing in this base ({printable(names[0])})"


def _foreign(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if not adapter.foreign:
        return None
    return f"calls {len(adapter.foreign)} modules differently ({printable(adapter.foreign[0])})"


def _unproven(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if adapter.loading is None or adapter.loading.proven:
        return None
    return "was not loaded by PEFT itself; only names and shapes were checked"


LOADING_RULES = (
    Rule("LOAD_FAILS", "a config that does not match its tensors in PEFT", _fails),
    Rule("LOAD_RESIZED", "a vocabulary other than the base's", _resized),
    Rule("LOAD_OTHER_BASE", "tensors that PEFT cannot load into the base's shapes", _other),
    Rule("LOAD_IGNORES", "tensors under names that PEFT does not recognise", _ignores),
    Rule("LOAD_UNKNOWN", "tensors that match nothing in the base", _unknown),
    Rule("FOREIGN_NAMES", "modules under the names of another version of transformers", _foreign),
    Rule("LOAD_UNPROVEN", "PEFT or transformers is missing or does not know the base", _unproven),
)
