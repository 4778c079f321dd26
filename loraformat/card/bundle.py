"""Model card of a bundle."""

from __future__ import annotations

from loraformat.card.document import BUNDLE_TAGS, Document
from loraformat.card.facts import BundleFacts
from loraformat.card.front_matter import members
from loraformat.card.markup import code, fence, link, numbers, table
from loraformat.card.parts import base_rows, document, file_table, joined, names
from loraformat.families.model_class import names_base_class
from loraformat.model.quantization_history import spelled
from loraformat.storage.byte_sizes import format_size

__all__ = ["bundle_card"]

#: By the end of the name of the class in the config: transformers' class that finds it, and what
#: the Hub calls its task.
_OPENINGS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
}
_EMBEDS = ("AutoModel", "feature-extraction")


def bundle_card(facts: BundleFacts) -> Document:
    """Return the model card of a bundle."""
    auto, pipeline = _opening(facts)
    tags = list(BUNDLE_TAGS if facts.said.block_sizes else BUNDLE_TAGS[:1])
    relation = "quantized" if facts.said.block_sizes else "finetune"
    sections = [
        _sentence(facts),
        _use(facts, auto),
        _what(facts),
        _adapters(facts),
        file_table(facts.files),
    ]
    fields = members(facts.base, relation, "transformers", tags, pipeline)
    return document(facts.repo, sections, fields, first=True)


def _sentence(facts: BundleFacts) -> str:
    said = facts.said
    how = "in NF4" if said.block_sizes else "in its own precision"
    return (
        f"{link(facts.base.repo)} {how}: {said.parameters:,} parameters in "
        f"{format_size(said.weight_bytes)}, {said.bits_per_weight:.3f} bits per weight. "
        "A loraformat bundle: safetensors files, with a SHA-256 of every tensor in "
        "`loraformat.json`."
    )


def _opening(facts: BundleFacts) -> tuple[str | None, str | None]:
    """Return the transformers class that opens a bundle, and the Hub's task tag if known."""
    architecture = facts.said.architecture
    if facts.headless or names_base_class({"architectures": [architecture]}):
        return _EMBEDS
    for ending, opening in _OPENINGS.items():
        if (architecture or "").endswith(ending):
            return opening
    return None, None


def _use(facts: BundleFacts, auto: str | None) -> str:
    name = facts.repo.rpartition("/")[2]
    parts = ["## Use"]
    if auto is not None:
        needs = ", with bitsandbytes installed" if facts.said.block_sizes else ""
        code_lines = (
            f"from transformers import {auto}, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{facts.repo}")\n'
            f'model = {auto}.from_pretrained("{facts.repo}")'
        )
        parts += [f"### transformers{needs}", fence(code_lines, "python")]
    lines = [
        f"loraformat pull {facts.repo} {name}   # every file compared with its hash",
        f"loraformat verify {name}",
    ]
    lines += [
        f"loraformat merge {name} {name}/adapters/{adapter.name} -o merged"
        for adapter in facts.said.adapters[:3]
    ]
    parts += ["### loraformat", fence("\n".join(lines), "sh")]
    return joined(parts)


def _what(facts: BundleFacts) -> str:
    rows, said = base_rows(facts.base), facts.said
    if said.architecture:
        rows.append(["architecture", f"{code(said.architecture)}, {said.layers} layers"])
    rows.append(["parameters", f"{said.parameters:,}"])
    if said.block_sizes:
        nested = "double quantization" if said.double_quant else "float32 scales"
        rows.append(
            [
                "quantized",
                f"{said.quantized_parameters:,} of them, NF4, blocks of "
                f"{numbers(said.block_sizes)}, {nested}",
            ]
        )
    errors = [e for tensor in said.tensors if (e := tensor.relative_rms_error) is not None]
    if errors:
        rows.append(
            [
                "relative RMS error of a weight",
                f"{min(errors):.4f} to {max(errors):.4f}"
                + (", against the quantized source" if said.quantized_before else ""),
            ]
        )
    if said.quantized_before:
        before = f"{code(spelled(said.quantized_before))}, not the original weights"
        rows.append(["quantized already when it was made", before])
    rows.append(["fingerprint", code(said.fingerprint or "")])
    return f"## What it is\n\n{table(['', ''], rows)}"


def _adapters(facts: BundleFacts) -> str:
    rows = [
        [
            code(adapter.name),
            numbers(adapter.ranks) or "none",
            names(adapter.targets),
            f"{adapter.parameters:,}",
        ]
        for adapter in facts.said.adapters
    ]
    head = ["adapter", "rank", "targets", "parameters"]
    return f"## Adapters\n\n{table(head, rows)}" if rows else ""
