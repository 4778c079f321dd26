"""Conversion of models between formats, tensor by tensor.

::

    source ── reader ──> Checkpoint ── encode (lazily) ──> Checkpoint
                                                               │
    output <── rename ── work directory <── writer ────────────┘
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from loraformat import plugins
from loraformat.bundle.reader import is_bundle
from loraformat.bundle.update import parse_bundle_slot, read_manifest
from loraformat.errors import UsageError, printable
from loraformat.hub import Source, resolve
from loraformat.model.tied_head import refuse_lost_head, settled
from loraformat.ops.arguments import Progress, byte_count, many, reported
from loraformat.ops.convert.adapter import convert_adapter
from loraformat.ops.convert.report import ConversionReport, complete, foreseen, losses, plan_report
from loraformat.ops.encoding.choice import Encoding
from loraformat.ops.encoding.llama_quantize import refuse_llama_type
from loraformat.ops.encoding.nf4_experts import layout_notes
from loraformat.ops.encoding.one_dtype import Alignment, aligned, with_decoded_dtype
from loraformat.ops.encoding.requantization import again_as, with_history
from loraformat.ops.model_output import ModelOutput
from loraformat.ops.opening.model import open_model, with_origin, without_generated_card
from loraformat.plugins import AdapterFormat, BaseFormat, Format, WriteOptions
from loraformat.shards.layout import DEFAULT_SHARD_LIMIT
from loraformat.tensors.dtypes import parse_weight_dtype

__all__ = ["convert"]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    from_: str | None = None,
    to: str | None = None,
    dtype: str | None = None,
    config: str | Path | None = None,
    pre: str | None = None,
    block_size: int | None = None,
    double_quant: bool | None = None,
    skip: str | Sequence[str] = (),
    include: str | Sequence[str] = (),
    max_shard_size: int | str | None = None,
    base: str | Path | None = None,
    canonical: bool = False,
    experts: Literal["dense", "each", "fused", "experts4bit"] | None = None,
    allow_pickle: bool = False,
    allow_base_mismatch: bool = False,
    strict: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = False,
    from_format: str | None = None,
    to_format: str | None = None,
) -> ConversionReport:
    """Convert a model or an adapter to another format.

    `source` is a local path or a Hub id (org/name, org/name@revision). Weights are read, converted
    and written one tensor at a time; `target` appears only when it is complete.

    To add an adapter to a bundle, use ``BUNDLE/adapters/NAME`` as `target`; to export it, use that
    as `source`. Its files are copied byte for byte where the formats allow. Apart from its
    manifest, nothing else in the bundle changes.

    Parameters
    ----------
    source : str or Path
        A local path, or ``org/name[@revision]`` on the Hub.
    target : str or Path
        The output. An adapter's may be ``BUNDLE/adapters/NAME``.
    from_ : str, optional
        Format of `source`. [default: detected]
    to : str, optional
        Format of `target`. [default: from its suffix, else loraformat, or peft for an adapter]
    dtype : str, optional
        Dtype of dense tensors, or of an adapter's factors. [default: unchanged; f16 for a GGUF
        output; GGUF block types become f32] The q types are only for GGUF outputs.
    config : str or Path, optional
        ``config.json`` of the model in a GGUF file. [default: inferred]
    pre : str, optional
        llama.cpp's name of the pre-tokenizer, for a GGUF output. [default: detected]
    block_size : int, optional
        Elements per absmax scale: a power of two from 32 to 4096. [default: 64]
    double_quant : bool, optional
        Quantize the absmax scales, too: 4.127 instead of 4.5 bits per weight; on by default.
    skip : str or sequence of str
        Do not quantize matching weights; overrides `include`.
    include : str or sequence of str
        Also quantize matching weights.
    max_shard_size : int or str, optional
        Maximum tensor bytes per file. [default: 2GB]
    base : str or Path, optional
        Adapters: base to compare names and shapes with.
    canonical : bool
        Adapters: convert to canonical form instead of copying: scaling folded into B, alpha = rank.
    experts : {"dense", "each", "fused", "experts4bit"}, optional
        Adapters: one LoRA for each expert, as vLLM and SGLang load most models, or PEFT's of the
        fused parameter; needs a base. [default: as in `source`, if PEFT loads it so] A bitsandbytes
        output: experts dense, an NF4 weight for each, or all in one, as replace_parameter_4bit or
        Experts4bit store them. [default: dense]
    allow_pickle : bool
        Also read pickled ``.bin`` files, with a loader restricted to tensors.
    allow_base_mismatch : bool
        Adapters: accept one made for another base; the output records this base.
    strict : bool
        Fail if `target` cannot hold everything in `source`.
    force : bool
        Replace an existing `target`.
    dry_run : bool
        Report the plan and the sizes without writing anything.
    progress : bool or callable
        True shows a bar on stderr; a callable gets the bytes done and in total.
    from_format, to_format : str, optional
        Former names of `from_` and `to`.

    Returns
    -------
    ConversionReport
        A `ModelConversion` or an `AdapterConversion`.

    Raises
    ------
    UsageError
        If an option is not for what `source` is.
    LoraFormatError
        The target is untouched then.
    """
    skip, include = many(skip), many(include)
    limit = None if max_shard_size is None else byte_count(max_shard_size, "max-shard-size")
    refuse_llama_type(dtype, Path(target), ["loraformat", "convert", str(source)])
    found = resolve(source, pickles=allow_pickle)
    reader = plugins.get(name) if (name := from_ or from_format) else plugins.sniff(found.path)
    for_bases = {
        "--block-size": block_size is not None,
        "--no-double-quant": double_quant is not None,
        "--skip": bool(skip),
        "--include": bool(include),
        "--max-shard-size": limit is not None,
        "--pre": pre is not None,
        "--config": config is not None,
    }
    for_adapters = {
        "--base": base is not None,
        "--canonical": canonical,
        "--allow-base-mismatch": allow_base_mismatch,
    }
    if isinstance(reader, AdapterFormat):
        _refuse_options(source, f"an adapter ({reader.name})", "bases", for_bases)
        if experts == "dense" or experts == "experts4bit":
            raise UsageError(f"--experts {experts} is for bases; an adapter has each or fused")
        return convert_adapter(
            found,
            reader,
            Path(target),
            to_format=to or to_format,
            dtype=dtype,
            base=base,
            canonical=canonical,
            experts=experts,
            allow_pickle=allow_pickle,
            allow_base_mismatch=allow_base_mismatch,
            force=force,
            strict=strict,
            dry_run=dry_run,
        )
    _refuse_options(source, f"a base ({reader.name})", "adapters", for_adapters)
    encoding = Encoding(dtype, block_size, double_quant, skip, include, experts)
    with reported(progress, "convert") as told:
        return _convert_base(
            found, reader, Path(target), encoding, to_format=to or to_format,
            shard_limit=limit or DEFAULT_SHARD_LIMIT, pre_tokenizer=pre, config=config,
            allow_pickle=allow_pickle, force=force, strict=strict, dry_run=dry_run, progress=told,
        )  # fmt: skip


def _refuse_options(source: str | Path, what: str, others: str, given: dict[str, bool]) -> None:
    if wrong := [option for option, is_given in given.items() if is_given]:
        raise UsageError(
            f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} for {others}, and {source} "
            f"is {what}",
            hint="omit the options that do not apply",
        )


def _convert_base(
    found: Source,
    reader: Format,
    target: Path,
    encoding: Encoding,
    *,
    to_format: str | None,
    shard_limit: int,
    pre_tokenizer: str | None,
    config: str | Path | None,
    allow_pickle: bool,
    force: bool,
    strict: bool,
    dry_run: bool,
    progress: Callable[[int, int], None],
) -> ConversionReport:
    began = time.perf_counter()
    if parse_bundle_slot(target) is not None:
        raise UsageError(f"{target} is for an adapter, and {found.path} is a base ({reader.name})")
    writer = plugins.for_output(target, to_format, BaseFormat, "loraformat")
    writer.check_pre_tokenizer(pre_tokenizer)
    encoding.check_experts(writer)
    # Quantized numbers are rounded only once: by a writer of types of its own, or as they are read.
    word = "f32" if writer.dtypes else encoding.dtype
    dtype = parse_weight_dtype(word) if word else None
    exact = writer.stores == "dense"
    with open_model(
        found, reader=reader, dtype=dtype, exact=exact, config=config, allow_pickle=allow_pickle
    ) as opened:
        original = without_generated_card(opened)
        refuse_lost_head(original)
        before = with_history(with_origin(original, found), codes_kept=not exact)
        before, decoded = with_decoded_dtype(before, writer, encoding.dtype)
        checkpoint, told = settled(encoding.apply(before, writer))
        alignment = Alignment()
        if not original.nf4_weights:  # else what is dense was left so on purpose
            checkpoint, alignment = aligned(checkpoint)
        checkpoint = encoding.stored(checkpoint)
        lost = losses(reader, writer, found.path, original.left_behind, strict=strict)
        report = plan_report(original, checkpoint, target, reader, writer, lost)
        again = again_as(original, checkpoint.tensors, writer, encoding.dtype)
        report.notes.extend([*told, *_adapters_note(found.path), *decoded])
        report.notes.extend(layout_notes(before, encoding.experts))
        options = WriteOptions(
            shard_limit,
            dtype=encoding.dtype if writer.dtypes else None,
            pre_tokenizer=pre_tokenizer,
        )
        if dry_run:
            report.notes.extend(alignment.notes())
            return foreseen(report, checkpoint, writer, target, options, again)
        plan = ["convert", asdict(encoding), shard_limit]
        with ModelOutput(
            target, writer, inputs=[original], plan=plan, force=force, progress=progress
        ) as output:
            written = output.write(checkpoint, options)
    report.notes.extend(alignment.notes())  # measured on the way
    return complete(report, checkpoint, written, again, time.perf_counter() - began)


def _adapters_note(source: Path) -> list[str]:
    """Note that a bundle's adapters are not converted."""
    if not is_bundle(source) or not (names := list(read_manifest(source).adapters)):
        return []
    place = f"BUNDLE/adapters/{printable(names[0])}"
    return [
        f"only the base is written; `loraformat merge BUNDLE {place}` merges an adapter into it, "
        "and `convert` converts it separately"
    ]
