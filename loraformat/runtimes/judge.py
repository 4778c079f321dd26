"""Evaluation of the rules for each runtime."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from loraformat.model.adapter_facts import AdapterFacts
from loraformat.runtimes.record import Finding, Outcome, Remedy, Runtime, Treatment
from loraformat.runtimes.remedies import Names, command, sentence
from loraformat.runtimes.rules import FORMAT, RULES

__all__ = ["findings", "obstacles"]

#: Where one finding needs the first of these, no other remedy helps any more.
_STRONGEST: tuple[Remedy, ...] = ("advice", "other-base", "merge", "merge-gguf")
#: What a user does before anything that fixes the adapter.
_FIRST = ("advice", "other-base")
#: How an adapter gets into the format that a runtime reads.
_CONVERSIONS: dict[str, Remedy] = {"peft": "peft", "gguf-lora": "gguf"}


def findings(
    adapter: AdapterFacts, runtimes: Iterable[Runtime], names: Names, *, named: bool = False
) -> list[Finding]:
    """Return the findings for each of these runtimes; `names` are those for the commands.

    With `named` the user asked about these runtimes and no others, and names no base: then an
    adapter in a format that the runtime does not read fails, too, instead of being a warning.

    Examples
    --------
    >>> from loraformat.model.adapter_facts import ModuleFacts
    >>> from loraformat.runtimes.known import RUNTIMES
    >>> module = ModuleFacts("model.layers.0.self_attn.q_proj", 16, 64, 64, 16.0, 1.0, dora=True)
    >>> facts = AdapterFacts("peft", (module,), dora=True)
    >>> found = findings(facts, [RUNTIMES["vllm"]], Names("A"))
    >>> [(finding.rule, finding.level, finding.command) for finding in found]
    [('DORA', 'fail', 'loraformat merge BASE A -o A-merged')]
    """
    return [
        Finding(
            rule=rule,
            runtime=runtime.name,
            level=treatment.level,
            outcome=treatment.outcome,
            what=what,
            why=treatment.why,
            remedy=sentence(treatment, adapter),
            command=command(treatment.remedy, adapter, runtime, names),
            kind=treatment.remedy,
        )
        for runtime in runtimes
        for rule, what, treatment in _found(adapter, runtime, named)
    ]


def _found(
    adapter: AdapterFacts, runtime: Runtime, named: bool
) -> list[tuple[str, str, Treatment]]:
    """Return for one runtime the rules that apply, what each found, and the treatment."""
    found = [
        (rule.id, what, treatment)
        for rule in RULES
        if (treatment := rule.treatment(runtime)) is not None
        if (what := rule.detect(adapter, runtime)) is not None
    ]
    failing = {t.remedy: (rule, t) for rule, _, t in found if t.level == "fail"}
    strongest = next((failing[remedy] for remedy in _STRONGEST if remedy in failing), None)
    if strongest is not None:
        return [(rule, what, _with_remedy(t, *strongest)) for rule, what, t in found]
    if adapter.format != runtime.format:
        outcome: Outcome = "refuses" if named else "caution"
        remedy = _CONVERSIONS.get(runtime.format, "merge")
        treatment = Treatment(outcome, runtime.format_why, remedy)
        found.insert(0, (FORMAT, f"is {adapter.format}", treatment))
    return found


def obstacles(found: Iterable[Finding]) -> dict[str, list[str]]:
    """Return by runtime the rules that no loading commands can satisfy.

    Left out is what a conversion fixes: the lines for another format begin with one.

    Examples
    --------
    >>> from loraformat.model.adapter_facts import ModuleFacts
    >>> from loraformat.runtimes.known import RUNTIMES
    >>> module = ModuleFacts("model.layers.0.self_attn.q_proj", 16, 64, 64, 16.0, 1.0, dora=True)
    >>> found = findings(AdapterFacts("peft", (module,), dora=True), RUNTIMES.values(), Names("A"))
    >>> obstacles(found)["vllm"], "transformers" in obstacles(found)
    (['DORA'], False)
    """
    rules: dict[str, list[str]] = {}
    for finding in found:
        if finding.level == "fail" and finding.rule != FORMAT and finding.kind != "gguf":
            rules.setdefault(finding.runtime, []).append(finding.rule)
    return rules


def _with_remedy(treatment: Treatment, rule: str, stronger: Treatment) -> Treatment:
    """Return a treatment with the remedy of a stronger one, if its own is not enough."""
    if treatment.remedy in ("advice", stronger.remedy):
        return treatment
    advice = f"first: {rule}" if stronger.remedy in _FIRST else None
    return replace(treatment, remedy=stronger.remedy, advice=advice)
