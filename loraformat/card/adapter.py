"""Model card of an adapter."""

from __future__ import annotations

from dataclasses import replace

from loraformat.card.document import Document
from loraformat.card.facts import AdapterFacts
from loraformat.card.front_matter import members
from loraformat.card.markup import code, fence, link, numbers, table
from loraformat.card.parts import base_rows, document, file_table, joined, names
from loraformat.card.training import evaluation, settings, training_data
from loraformat.runtimes.chat import GENERATION_NAME
from loraformat.runtimes.usage import snippets_of
from loraformat.runtimes.use import TEMPLATE_NAME, Snippet, Use
from loraformat.storage.byte_sizes import format_size

__all__ = ["adapter_card"]

#: The picture that the trainer makes.
_LOSS_CURVE = "loss.png"
#: What the Hub calls the task that PEFT calls so.
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def adapter_card(facts: AdapterFacts) -> Document:
    """Return the model card of an adapter."""
    kind = "peft" if facts.peft else "gguf"
    tags = ["lora", "loraformat", f"base_model:adapter:{facts.base.repo}"]
    tags += ["transformers"] if facts.peft else []
    tags += ["gguf"] if facts.gguf else []
    sections = [
        _sentence(facts),
        _use(facts),
        _what(facts),
        training_data(facts.training),
        evaluation(facts.training),
        _picture(facts),
        file_table(facts.files),
        settings(facts.training),
    ]
    pipeline = _PIPELINES.get(facts.task or "")
    return document(facts.repo, sections, members(facts.base, "adapter", kind, tags, pipeline))


def _sentence(facts: AdapterFacts) -> str:
    at = f" at revision {code(facts.base.revision[:12])}" if facts.base.revision else ""
    size = format_size(sum(file.nbytes for file in facts.files))
    rank, targets = numbers(facts.said.ranks) or "none", names(facts.said.targets) or "nothing"
    return (
        f"A LoRA adapter of {link(facts.base.repo)}{at}: rank {rank} on {targets}; "
        f"{facts.said.parameters:,} parameters, {size}."
    )


def _picture(facts: AdapterFacts) -> str:
    there = any(file.path == _LOSS_CURVE for file in facts.files)
    return f"![Loss curve]({_LOSS_CURVE})" if there else ""


def _what(facts: AdapterFacts) -> str:
    rows, said = base_rows(facts.base), facts.said
    if said.base_fingerprint:
        rows.append(["made for the base", f"{code(said.base_fingerprint)} (fingerprint)"])
    rows += [
        ["rank", numbers(said.ranks) or "none"],
        ["alpha", numbers(said.alphas)],
        ["B A is scaled by", numbers(said.scalings)],
        ["targets", f"{names(said.targets)} ({len(said.modules)} modules)"],
        ["trainable parameters", f"{said.parameters:,}"],
        ["stored as", ", ".join(f"{name}: {n:,}" for name, n in said.dtypes.items())],
    ]
    if said.dora:
        rows.append(["DoRA", f"{said.dora} modules with a magnitude"])
    if said.biases:
        rows.append(["biases", f"{said.biases} modules"])
    if replaced := [*said.replacements, *said.replaced_rows]:
        rows.append(["replaces", names(replaced)])
    return f"## What it is\n\n{table(['', ''], [row for row in rows if row[1]])}"


def _use(facts: AdapterFacts) -> str:
    """Return the section on loading, with the names of the adapter's files."""
    name = facts.repo.rpartition("/")[2]
    gguf = facts.gguf or f"{name}.gguf"
    base_name = facts.base.repo.rpartition("/")[2]
    beside = {file.path for file in facts.files}
    chat = facts.chat
    if chat is not None:  # only what is published can be fetched
        chat = replace(
            chat,
            template=TEMPLATE_NAME if TEMPLATE_NAME in beside else None,
            stop_ids=chat.stop_ids if GENERATION_NAME in beside else (),
        )
    use = Use(
        name=name,
        base=facts.base.repo,
        adapter=facts.repo if facts.peft else gguf,
        rank=max(facts.said.ranks, default=1),
        gguf=gguf,
        base_gguf=f"{base_name}.gguf",
        revision=facts.base.revision,
        chat=chat,
        on_hub=facts.peft,
        labels=facts.labels,
    )
    lines = snippets_of(facts.task)
    shown = {name for name in lines if name not in facts.wrong_in}
    parts = []
    if facts.peft and "transformers" in shown:
        parts.append(_shown("transformers and PEFT", lines["transformers"](use)))
    if facts.peft and "vllm" in shown:
        parts.append(_shown("vLLM", lines["vllm"](use)))
    if "llama.cpp" in shown or (facts.gguf and "llama.cpp" in lines):
        parts.append(_shown("llama.cpp", lines["llama.cpp"](use), _fetch(facts, use)))
    if "ollama" in shown or (facts.gguf and "ollama" in lines):
        before = "A `Modelfile`; its first line makes the file that it names:"
        parts.append(_shown("Ollama", lines["ollama"](use), before))
    return joined(["## Use", *parts]) if parts else ""


def _fetch(facts: AdapterFacts, use: Use) -> str:
    """Return the commands that produce the two files for llama.cpp."""
    base = f"loraformat convert {use.pinned_base} {use.base_gguf} --dtype f16"
    if facts.gguf:
        lora = f"hf download {facts.repo} {facts.gguf} --local-dir ."
    else:
        lora = f"loraformat convert {facts.repo} {use.gguf} --base {use.pinned_base}"
    return fence(f"{base}\n{lora}", "sh")


def _shown(title: str, snippet: Snippet, before: str = "") -> str:
    return joined([f"### {title}", before, fence(snippet.text, snippet.language)])
