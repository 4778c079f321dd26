"""The command that fixes a finding, with the user's file names."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from loraformat.model.adapter_facts import AdapterFacts
from loraformat.runtimes.architectures import merges_into_gguf
from loraformat.runtimes.ranks import vllm_limit
from loraformat.runtimes.record import Remedy, Runtime, Treatment

__all__ = ["Names", "command", "sentence"]

#: What each remedy does, and the arguments of loraformat that do it.
_REMEDIES: dict[Remedy, tuple[str, str]] = {
    "fix": ("write it in portable form", "check {adapter} --fix -o {stem}-fixed{held}"),
    "fill": (
        "write it in portable form, with zeros for missing modules",
        "check {adapter} --fix -o {stem}-fixed --base {base}",
    ),
    "gguf": ("convert it", "convert {adapter} {stem}.gguf --base {base}"),
    "peft": ("convert it", "convert {adapter} {stem}-peft --base {base}"),
    "merge": ("merge it", "merge {base} {adapter} -o {stem}-merged"),
    "merge-gguf": ("merge it", "merge {base} {adapter} -o {stem}-merged.gguf"),
    "reduce": ("reduce its rank", "reduce {adapter} -o {stem}-r{most} --rank {most}"),
    "rewrite": ("rewrite it", "convert {adapter} {stem}-rewritten --canonical{held}"),
    "retype": ("rewrite it", "convert {adapter} {stem}-f32 --dtype f32{held}"),
    "experts": (
        "write a LoRA for each expert",
        "convert {adapter} {stem}-each --experts each --base {base}",
    ),
    "experts-fused": (
        "write it for the fused experts",
        "convert {adapter} {stem}-fused --experts fused --base {base}",
    ),
    "other-base": (
        "give the base that it was trained on",
        "check {adapter} --base {its_base}",
    ),
}


@dataclass(frozen=True, slots=True)
class Names:
    """The user's names of the adapter and its base: paths or Hub ids."""

    adapter: str
    base: str | None = None

    @property
    def stem(self) -> str:
        """Last part of the adapter's name, for output names.

        Examples
        --------
        >>> Names("org/polite@main").stem, Names("out/lora.gguf").stem
        ('polite', 'lora')
        """
        last = self.adapter.rstrip("/").rpartition("/")[2]
        last = re.sub(r"\.gguf$|@.*$", "", last)
        return last if re.search(r"\w", last) else "adapter"


def command(remedy: Remedy, adapter: AdapterFacts, runtime: Runtime, names: Names) -> str | None:
    """Return a command line, with ``BASE`` if the user named no base.

    Examples
    --------
    >>> from loraformat.runtimes.known import RUNTIMES
    >>> command("merge", AdapterFacts("peft"), RUNTIMES["vllm"], Names("A", "org/base"))
    'loraformat merge org/base A -o A-merged'
    """
    if remedy == "advice":
        return None
    if remedy == "merge-gguf" and not merges_into_gguf(adapter):
        remedy = "merge"
    base = shlex.quote(names.base) if names.base else "BASE"
    arguments = _REMEDIES[remedy][1].format(
        adapter=shlex.quote(names.adapter),
        stem=shlex.quote(names.stem),
        base=base,
        held=f" --base {base}" if names.base or adapter.format != "peft" else "",
        most=runtime.most or runtime.kernel_rank,
        its_base=_its_base(adapter, names),
    )
    return f"loraformat {arguments}"


def _its_base(adapter: AdapterFacts, names: Names) -> str:
    """Return the base that an adapter names, if it is not the one tried."""
    named = adapter.base_model
    known = named and named.isprintable() and not named.startswith("-") and named != names.base
    return shlex.quote(named) if named and known else "BASE"


def sentence(treatment: Treatment, adapter: AdapterFacts) -> str:
    """Return the advice: the runtime's own, or a description of the command.

    Examples
    --------
    >>> from loraformat.runtimes.record import caution
    >>> from loraformat.model.adapter_facts import ModuleFacts
    >>> facts = AdapterFacts("peft", (ModuleFacts("q_proj", 40, 64, 64, 40.0, 1.0),))
    >>> found = caution("it has a limit", "advice", "start it with --max-lora-rank {limit}")
    >>> sentence(found, facts)
    'start it with --max-lora-rank 64'
    """
    if treatment.advice is not None:
        return treatment.advice.format(limit=vllm_limit(adapter.rank) or adapter.rank)
    if treatment.remedy == "merge-gguf" and not merges_into_gguf(adapter):
        return "merge it into safetensors for transformers or vLLM: llama.cpp has no head for it"
    return "" if treatment.remedy == "advice" else _REMEDIES[treatment.remedy][0]
