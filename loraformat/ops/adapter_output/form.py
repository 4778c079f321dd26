"""Whether an adapter is copied byte for byte or converted to canonical form.

A copy is the rule where source and output have one format. It is converted where
somebody asks for it (``--canonical``, ``--dtype``), where the source is a pickle or was
changed in memory, and where it shall belong to another base than it says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from loraformat.bundle.integrity import check_listed
from loraformat.card.carried import with_true_card
from loraformat.errors import UsageError
from loraformat.families.model_class import names_base_class
from loraformat.model.adapter import Adapter
from loraformat.model.architecture import module_of
from loraformat.model.base_match import BaseMatch
from loraformat.model.base_names import names_of
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.model.config_json import parse
from loraformat.model.expert_layouts import ExpertLayout, is_of_one_expert, rearranged
from loraformat.model.tied_head import lacks_head
from loraformat.model.written import FileRecord
from loraformat.ops.adapter_output.base import AdapterBase
from loraformat.ops.merge.plan import plan_edits
from loraformat.ops.opening.adapter import copy_adapter
from loraformat.ops.opening.model import difference_of
from loraformat.plugins import AdapterFormat, AdapterWriteOptions
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors.dtypes import parse_weight_dtype

_LAYOUTS: dict[ExpertLayout, str] = {"each": "one by one", "fused": "as one parameter"}

__all__ = ["AdapterForm", "PlannedAdapter", "check_fits", "check_values", "tensors_of"]


@dataclass(frozen=True, slots=True)
class PlannedAdapter:
    """An adapter as it will be read again, and how it will be written.

    Its files are copied if it is ``verbatim``; ``expected`` is what the manifest of the bundle that
    they come from says of them. ``notes`` are what a user should know.
    """

    adapter: Adapter
    writer: AdapterFormat
    options: AdapterWriteOptions
    verbatim: bool
    notes: tuple[str, ...]
    expected: Mapping[str, FileRecord] | None = None

    def write(self, publication: AtomicOutput) -> list[str]:
        """Write the adapter into an output's work directory and return the writer's notes."""
        notes: list[str] = []
        if self.verbatim:
            copy_adapter(self.adapter, publication)
            if self.expected is not None:  # the source was compared before: now the copy
                check_listed(SafeDirectory(publication.work), self.expected)
            return notes
        assert self.writer.write is not None
        self.writer.write(self.adapter, publication, replace(self.options, note=notes.append))
        return notes


@dataclass(frozen=True, slots=True)
class AdapterForm:
    """How adapters are written.

    Attributes
    ----------
    writer : AdapterFormat
    base : AdapterBase or None
        What they are held against, and whose config or shapes the writer may need. If it is a
        bundle, they get its fingerprint.
    dtype : str or None
        ``f32``, ``f16``, ``bf16`` or another of the writer's for the factors, rounded to nearest
        even. By default each keeps its own where folding the scaling loses nothing in it.
    canonical : bool
        Write them anew in any case, and fold the scaling into B; else it stays apart where one
        alpha says every module's.
    allow_base_mismatch : bool
        Give an adapter that fingerprint although it has another.
    experts : {"each", "fused"} or None
        How its experts are written; None leaves them as they are, unless PEFT could not load them.
    """

    writer: AdapterFormat
    base: AdapterBase | None
    dtype: str | None
    canonical: bool
    allow_base_mismatch: bool
    experts: ExpertLayout | None

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The open base, if one is known."""
        return None if self.base is None else self.base.checkpoint

    def plan(
        self, adapter: Adapter, expected: Mapping[str, FileRecord] | None = None
    ) -> PlannedAdapter:
        """Decide how an adapter is written.

        ``expected`` is of each file that is copied; a difference is an error.

        Raises
        ------
        InputError
            If it was made for another base.
        """
        writer, checkpoint, notes = self.writer, self.checkpoint, list[str]()
        reason = _reason(adapter, writer, self.dtype)
        if self.experts is not None and writer.name == "peft":
            reason = reason or f"its experts are written {_LAYOUTS[self.experts]}"
        foreign = adapter.format != writer.name
        own = None if self.base is None else self.base.fingerprint
        descent = None if checkpoint is None else checkpoint.provenance.fingerprint
        if own is not None or (descent and adapter.base_fingerprint):
            match = BaseMatch(adapter.base_fingerprint, own or descent, descends=own is None)
            if own is not None and match.relation == "other":
                reason = reason or "the base fingerprint must be recorded"
            notes += _mismatch(adapter, match, self.allow_base_mismatch)
        rewritten, ours = not adapter.verbatim, adapter
        if checkpoint is not None and writer.name == "peft":
            ours = _in_memory(adapter, checkpoint)
            rewritten = rewritten or _names_in_file(adapter) != _names_in_file(ours)
            if rewritten and not foreign:
                reason = reason or "PEFT uses other names for this base's modules"
        if not self.canonical and reason is None:
            options = AdapterWriteOptions(base=checkpoint)
            return PlannedAdapter(adapter, writer, options, True, tuple(notes), expected)
        if not self.canonical:
            # One file has one scaling for all: its writer says itself what it folds.
            kept = foreign or rewritten or writer.output == "file"
            folded = "" if kept else " (scaling folded into B)"
            notes.append(f"converted, not copied{folded}: {reason}")
        if checkpoint is not None and writer.name == "peft":
            ours = _in_memory(rearranged(adapter, checkpoint, self.experts), checkpoint)
        if self.base is not None and own is not None:
            source = json.dumps(dict(self.base.source), ensure_ascii=False)
            ours = replace(ours, base_fingerprint=own, base_source=source)
        keep = (foreign or rewritten) and not self.canonical
        options = AdapterWriteOptions(_dtype(writer, self.dtype), checkpoint, keep_scaling=keep)
        anew = replace(ours, verbatim=False, files=with_true_card(ours.files))
        return PlannedAdapter(anew, writer, options, False, tuple(notes))


def _in_memory(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return an adapter renamed to PEFT's names of the base's modules."""
    adapter = _with_task(adapter, base)
    names = names_of(base, adapter.config.get("task_type"))
    changed = [*adapter.deltas, *adapter.replacements, *adapter.rows]
    # Single experts are not in memory: PEFT, vLLM and SGLang know them by the checkpoint's names.
    found = {t: t if is_of_one_expert(t) else names.in_memory(t) for t in changed}
    modules = {module_of(target): module_of(name) for target, name in found.items()}
    saved = adapter.config.get("modules_to_save") or []
    config = adapter.config
    if any(modules.get(name, name) != name for name in saved):
        config = {**config, "modules_to_save": [modules.get(name, name) for name in saved]}
    spellings = {target: name for target, name in found.items() if target != name}
    return replace(adapter, spellings=spellings, config=config)


def _with_task(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return an adapter whose config names the task, for an embedding model as base."""
    if adapter.config.get("task_type") is not None or base.config is None:
        return adapter
    config = parse(base.config)
    if not (names_base_class(config) or lacks_head(base.tensors, config)):
        return adapter
    return replace(adapter, config={**adapter.config, "task_type": "FEATURE_EXTRACTION"})


def _names_in_file(adapter: Adapter) -> list[str]:
    """Return the tensor names in an adapter's file."""
    changed = [*adapter.deltas, *adapter.replacements, *adapter.rows]
    return [adapter.spellings.get(target, target) for target in changed]


def _dtype(writer: AdapterFormat, word: str | None) -> str | None:
    if word is None:
        return None
    if not writer.dtypes:
        return parse_weight_dtype(word)
    if word not in writer.dtypes:
        raise UsageError(f"--dtype {word}: {writer.name} wants one of {', '.join(writer.dtypes)}")
    return word.upper()


def _reason(adapter: Adapter, writer: AdapterFormat, dtype: str | None) -> str | None:
    """Return why a byte-for-byte copy would be wrong; None if it is right."""
    if adapter.format != writer.name:
        return f"the format changes from {adapter.format} to {writer.name}"
    if dtype is not None:
        return f"its factors become {dtype}"
    if adapter.verbatim:
        return None
    if writer.output == "file":
        return f"{writer.name} files are always converted"
    return "it was a pickle, was sharded, was modified, or had names that PEFT does not recognise"


def _mismatch(adapter: Adapter, match: BaseMatch, allowed: bool) -> list[str]:
    if match.relation == "unknown":
        return ["records no base fingerprint; only names and shapes were compared"]
    return [f"it {difference_of(adapter, match, allowed)}"] if match.relation == "other" else []


def check_fits(adapter: Adapter, base: Checkpoint) -> list[str]:
    """Check that a base has every tensor that an adapter changes, with matching shapes.

    Returns what a user should know, where the shapes are those of another vocabulary.

    Raises
    ------
    UnsupportedError
        Naming the module, and the nearest one that the base has.
    """
    # A bias where the base has none cannot be merged, but PEFT adds it at run time.
    deltas = {name: replace(delta, bias=None) for name, delta in adapter.deltas.items()}
    plan = plan_edits(base, [replace(adapter, deltas=deltas)], [1.0])
    if plan.resize is None:
        return []
    return [
        f"its vocabulary has {plan.resize.after} tokens, and this base's {plan.resize.before}: "
        "merge, eval, generate and train resize the base, and in PEFT "
        f"model.resize_token_embeddings({plan.resize.after}) is needed before loading the adapter"
    ]


def check_values(adapter: Adapter) -> None:
    """Load every tensor once, so that NaN and infinity are refused.

    Raises
    ------
    InputError
        Naming the tensor.
    """
    moments = [d.second_moment for d in adapter.deltas.values() if d.second_moment is not None]
    for tensor in (*tensors_of(adapter), *moments):
        tensor.load()
        tensor.release()


def tensors_of(adapter: Adapter) -> Iterator[DenseTensor]:
    """Yield every tensor of an adapter."""
    for delta in adapter.deltas.values():
        parts = (delta.a, delta.b, delta.magnitude, delta.bias)
        yield from (part for part in parts if part is not None)
    yield from adapter.replacements.values()
    yield from (rows.rows for rows in adapter.rows.values())
