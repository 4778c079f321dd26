"""Compatibility checks of an adapter, by runtime, and its portable form."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from loraformat import plugins
from loraformat.bundle.update import parse_bundle_slot
from loraformat.errors import UnsupportedError, UsageError
from loraformat.families.table import family_of, model_type
from loraformat.families.tensor_names import layer_of
from loraformat.hub import resolve
from loraformat.model.adapter_facts import AdapterFacts, BaseFacts
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.expert_layouts import ExpertLayout, has_single_experts
from loraformat.model.report import Report
from loraformat.model.tied_head import config_of, tied_embedding, tied_head
from loraformat.model.tokenizer_files import CarriedTokenizer
from loraformat.model.vocabulary import per_token
from loraformat.ops.adapter_output.base import open_adapter_base
from loraformat.ops.arguments import many
from loraformat.ops.check.prompts import template_change, tokenizer_beside, tokenizer_change
from loraformat.ops.check.write import Written, write_usage
from loraformat.ops.convert.adapter import AdapterConversion, convert_adapter
from loraformat.ops.opening.model import origin_fingerprint
from loraformat.plugins import AdapterFormat, AdapterReadOptions
from loraformat.runtimes.architectures import gguf_architecture
from loraformat.runtimes.from_adapter import facts_of
from loraformat.runtimes.judge import findings
from loraformat.runtimes.known import RUNTIMES
from loraformat.runtimes.record import Finding
from loraformat.runtimes.remedies import Names

__all__ = ["CheckReport", "check", "examine", "fix"]

#: Stands for the tensors of a base of which there is a config alone.
_AN_EMBEDDING = ("model.embed_tokens.weight",)


@dataclass(frozen=True, slots=True, repr=False)
class CheckReport(Report):
    """Report of ``check``.

    Attributes
    ----------
    path, format : str
        The adapter.
    base : str or None
        What it was held against.
    ranks : list of int
    modules : int
    verdicts : dict of str to str
        By runtime: ``right``; ``care``, with warnings; ``wrong``, which refuses it or would
        compute something else.
    findings : list of Finding
    facts : AdapterFacts
        Not part of the JSON.
    written : Written or None
        Files that load it, if they were asked for.
    """

    _shared: ClassVar[tuple[str, ...]] = ()

    path: str
    format: str
    base: str | None
    ranks: list[int]
    modules: int
    verdicts: dict[str, str]
    findings: list[Finding]
    facts: AdapterFacts = field(repr=False)
    written: Written | None = None

    @property
    def failed(self) -> bool:
        """Whether some runtime would refuse the adapter or compute something else."""
        return "wrong" in self.verdicts.values()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON members."""
        members = Report.to_dict(replace(self, facts=AdapterFacts(self.format)))
        del members["facts"]
        if self.written is None:
            del members["written"]
        return members


def check(
    adapter: str | Path,
    *,
    base: str | Path | None = None,
    runtime: str | Sequence[str] = (),
    write: str | Path | None = None,
    allow_pickle: bool = False,
) -> CheckReport:
    """Check how inference runtimes load an adapter.

    `adapter` is a PEFT directory, a GGUF file, ``BUNDLE/adapters/NAME``, or a Hub id. Each finding
    says what the runtime does, why, and which command fixes it. A finding is a failure if the
    runtime rejects the adapter or computes a different result, and a warning if some action or
    caution is needed. A format that a runtime cannot read is a warning, or a failure if `runtime`
    names that runtime.

    `fix` writes the same deltas with the scaling folded into B, alpha equal to the rank, and a
    single rank for all modules, which every runtime interprets the same way. Adapters that contain
    more than low-rank deltas are rejected; merge those instead.

    Parameters
    ----------
    adapter : str or Path
        A PEFT directory, a GGUF file, ``BUNDLE/adapters/NAME``, or a Hub id.
    base : str or Path, optional
        Compare names, shapes, architecture and fingerprint with this base. An adapter in a bundle
        is compared with that bundle.
    runtime : str or sequence of str
        transformers, vllm, sglang, lorax, llama.cpp, ollama or mlx. [default: all]
    write : str or Path, optional
        Write a Modelfile, command lines and a script that load this adapter into a new directory
        DIR.
    allow_pickle
        As in `convert`.

    Returns
    -------
    CheckReport

    Raises
    ------
    UsageError
        If there is no such runtime.
    InputError
        If the adapter is damaged.
    """
    runtimes = many(runtime)
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown:
        raise UsageError(f"no runtime {unknown[0]!r}, wanted one of {', '.join(RUNTIMES)}")
    facts, base_path = examine(adapter, base=base, allow_pickle=allow_pickle)
    chosen = [RUNTIMES[name] for name in dict.fromkeys(runtimes)] or list(RUNTIMES.values())
    names = Names(str(adapter), str(base) if base is not None else base_path)
    found = findings(facts, chosen, names, named=bool(runtimes) and names.base is None)
    report = CheckReport(
        path=str(adapter),
        format=facts.format,
        base=names.base,
        ranks=facts.ranks,
        modules=len(facts.modules),
        verdicts={runtime.name: _verdict(runtime.name, found) for runtime in chosen},
        findings=found,
        facts=facts,
    )
    if write is None:
        return report
    known = None if base is None else str(base)
    return replace(report, written=write_usage(report, write, base=known))


def _verdict(runtime: str, found: Sequence[Finding]) -> str:
    levels = {finding.level for finding in found if finding.runtime == runtime}
    return "wrong" if "fail" in levels else "care" if levels else "right"


def examine(
    source: str | Path, *, base: str | Path | None = None, allow_pickle: bool = False
) -> tuple[AdapterFacts, str | None]:
    """Collect the facts of an adapter, and of its base if known.

    Returned beside them is the path of the bundle that it lies in, or of the base that was named.

    Raises
    ------
    UnsupportedError
        If it is no adapter.
    """
    path = resolve(source, pickles=allow_pickle).path
    reader = _reader(path)
    place = parse_bundle_slot(path)
    with ExitStack() as stack:
        held = open_adapter_base(stack, base, place)
        opened = None if held is None else held.checkpoint
        facts = _facts(reader, path, AdapterReadOptions(opened, allow_pickle, True, True))
        if opened is None:
            return facts, None
        return _held(facts, path, opened), str(opened.path)


def _reader(path: Path) -> AdapterFormat:
    reader = plugins.sniff(path, AdapterFormat)
    if not isinstance(reader, AdapterFormat):
        raise UnsupportedError(
            f"is a model ({reader.name}), not an adapter",
            path=path,
            hint="check looks at adapters; a bundle's are BUNDLE/adapters/NAME",
        )
    return reader


def _held(facts: AdapterFacts, path: Path, base: Checkpoint) -> AdapterFacts:
    """Return the facts of an adapter after comparing it with its base."""
    facts = replace(facts, base=_base_facts(base))
    if not base.files:  # a config alone: nothing is known of its tokenizer
        return facts
    ours, its = tokenizer_beside(path), CarriedTokenizer(base.files, base.path)
    return replace(
        facts,
        tokenizer_change=tokenizer_change(ours, its),
        template_change=template_change(ours, its),
    )


def _facts(reader: AdapterFormat, path: Path, options: AdapterReadOptions) -> AdapterFacts:
    if reader.examine is not None:
        return reader.examine(path, options)
    with reader.read(path, options) as adapter:
        return facts_of(adapter, options.base)


def _base_facts(base: Checkpoint) -> BaseFacts:
    config = config_of(base)
    named = model_type(config)
    layers = {layer[1] for name in base.tensors if (layer := layer_of(name))}
    return BaseFacts(
        model_type=named,
        tied=_is_tied(base, config),
        fingerprint=origin_fingerprint(base),
        named=bool(base.tensors),
        layers=max(layers) + 1 if layers else None,
        tokens=max(per_token(base.tensors).values(), default=None),
        gguf_architecture=gguf_architecture(named),
        commit=base.provenance.revision,
        shared_block=family_of(config).shared_block,
        single_experts=has_single_experts(base),
    )


def _is_tied(base: Checkpoint, config: dict[str, Any]) -> bool:
    if not base.tensors:
        return tied_embedding(_AN_EMBEDDING, config) is not None
    return tied_head(base) is not None


def fix(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    experts: ExpertLayout | None = None,
    force: bool = False,
    dry_run: bool = False,
    allow_pickle: bool = False,
) -> AdapterConversion:
    """Write an adapter in the form that every runtime interprets the same way.

    The scaling is folded into B, alpha equals the rank and is an integer, all modules have one
    rank (zeros change no product), there are no patterns and no rsLoRA, names are PEFT's. With
    the weights of its base, a type of module that some layers adapt gets zeros in the others.
    Folding is done in float64 and rounded once to B's dtype, or to float32 where its own has 16
    bits and would lose some: a delta differs from the original by at most that rounding.

    Parameters
    ----------
    adapter : str or Path
        A PEFT directory, a GGUF file, ``BUNDLE/adapters/NAME``, or a Hub id.
    output : str or Path
        A PEFT directory, or ``BUNDLE/adapters/NAME``.
    base : str or Path, optional
        Base to compare names and shapes with.
    dtype : str, optional
        ``f32``, ``f16`` or ``bf16`` for the factors; unchanged if that is lossless.
    experts : {"each", "fused"}, optional
        One LoRA for each expert, or for the fused parameter; needs `base`. As in `adapter` by
        default, if PEFT loads it so.
    force : bool
        Replace an existing output.
    dry_run : bool
        Write nothing; report what would be written.
    allow_pickle : bool
        Also read pickled ``.bin`` files, with a loader restricted to tensors.

    Returns
    -------
    AdapterConversion

    Raises
    ------
    UnsupportedError
        If it is more than low-rank deltas (DoRA, biases, replaced modules or rows, aLoRA); merge
        it instead.
    LoraFormatError
        Nothing appears at the output then.
    """
    target = Path(output)
    if target.suffix in (".gguf", ".safetensors"):
        raise UsageError(
            f"-o {target}: --fix writes a PEFT directory",
            hint="use a directory, and convert that to GGUF",
        )
    found = resolve(adapter, pickles=allow_pickle)
    return convert_adapter(
        found,
        _reader(found.path),
        target,
        to_format="peft",
        dtype=dtype,
        base=base,
        canonical=True,
        one_rank=True,
        experts=experts,
        allow_pickle=allow_pickle,
        force=force,
        dry_run=dry_run,
    )
