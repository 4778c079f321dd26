"""Extraction of an adapter from a base and its fine-tune.

Each changed matrix becomes a low-rank delta, found by block Krylov iteration on the
difference, which only exists in row tiles; each changed vector (norms, biases) and each
grown vocabulary is replaced in full; what is neither is listed.
"""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy

from loraformat.algebra import lora
from loraformat.algebra.lora import Pair
from loraformat.errors import InputError, printable
from loraformat.families.table import family_of
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.architecture import is_conv1d, kind_of
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor
from loraformat.model.tied_head import HEAD, config_of
from loraformat.model.vocabulary import per_token, tokenizer_files
from loraformat.ops.adapter_output.output import ensure_not_exists, open_adapter_output
from loraformat.ops.arguments import Progress, many, reported
from loraformat.ops.deltas.spool import Spool
from loraformat.ops.encoding.encode import dequantized
from loraformat.ops.extract.difference import PRECISIONS, Difference
from loraformat.ops.extract.fit import ExtractOptions, Fit, fit
from loraformat.ops.extract.paired_tensors import Stack, pairs_of, stacks_of
from loraformat.ops.extract.report import ExtractedModule, ExtractionReport
from loraformat.ops.opening.model import fingerprint_of, open_model
from loraformat.tensors.arrays import numpy_dtype, same_bytes
from loraformat.tensors.dtypes import WEIGHT_DTYPES, parse_weight_dtype

__all__ = ["ExtractOptions", "extract", "extract_adapter"]

_EMBEDDING = re.compile(r"(^|\.)(?!embed_out$)(\w*embed\w*|wte|wpe)$")
_Orientation = Literal["linear", "transposed"]


def extract(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    rank: int | Literal["auto"] | None = None,
    energy: float | None = None,
    max_rank: int = 256,
    skip: str | Sequence[str] = (),
    dtype: str | None = None,
    allow_base_mismatch: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = False,
) -> ExtractionReport:
    """Extract an adapter from a base and its fine-tune.

    The float32 difference of each matrix is approximated by a low-rank delta; changed norms,
    changed biases and resized embeddings are stored in full. The captured share of each module's
    difference is measured and reported.

    Parameters
    ----------
    base, tuned : str or Path
        Models in any format, or Hub ids.
    output : str or Path
        Output adapter: a PEFT directory, ``NAME.gguf`` for llama.cpp, or ``BUNDLE/adapters/NAME``.
    rank : int or "auto", optional
        Rank of every module that differs by more than rounding noise; auto picks the rank at which
        rounding noise of `tuned` begins. [default: auto]
    energy : float, optional
        Capture this fraction of each difference's squared norm.
    max_rank : int
        Upper bound for ``rank="auto"`` and `energy`.
    skip : str or sequence of str
        Leave out matching tensors.
    dtype : str, optional
        Dtype of the factors. [default: that of `tuned`]
    allow_base_mismatch : bool
        Allow an output bundle other than `base`.
    force : bool
        Replace an existing `output`.
    dry_run : bool
        Report ranks and captured shares without writing anything.
    progress
        As in `convert`.

    Returns
    -------
    ExtractionReport
    """
    began = time.perf_counter()
    options = ExtractOptions(rank, energy, max_rank, many(skip), dtype)
    if not dry_run:
        ensure_not_exists(output, force=force)
    with ExitStack() as stack:
        told = stack.enter_context(reported(progress, "extract"))
        one, other = (stack.enter_context(open_model(model)) for model in (base, tuned))
        out = open_adapter_output(
            stack, output, base=one, dtype=dtype, force=force, dry_run=dry_run,
            allow_base_mismatch=allow_base_mismatch,
        )  # fmt: skip
        adapter, report = extract_adapter(one, other, options, progress=told)
        with adapter:
            named = replace(adapter, base_model=str(base), base_fingerprint=fingerprint_of(one))
            notes = [*report.notes, *out.write(named)]
    return replace(
        report,
        base=str(base),
        tuned=str(tuned),
        target=str(output),
        notes=notes,
        seconds=time.perf_counter() - began,
        dry_run=dry_run,
    )


def extract_adapter(
    base: Checkpoint,
    tuned: Checkpoint,
    options: ExtractOptions,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Adapter, ExtractionReport]:
    """Return the adapter between two open models, and its report.

    Parameters
    ----------
    base, tuned : Checkpoint
        They must stay open until the adapter is written.
    options : ExtractOptions
    progress : callable

    Returns
    -------
    Adapter
        To be closed; its factors are in a temporary file.
    ExtractionReport

    Raises
    ------
    InputError
        If the models have nothing in common, or hold NaN.
    """
    if not set(base.tensors) & set(tuned.tensors):
        raise InputError(
            f"has no tensor in common with {printable(base.path)}",
            path=tuned.path,
            hint="extract needs a base and a fine-tune of it",
        )
    pairs = pairs_of(base, tuned)
    work = _Extraction(options, config_of(tuned), pairs.tied)
    total = sum(tensor.nbytes for _, tensor in pairs.tensors)
    done = 0
    try:
        stacks, rest = stacks_of(pairs.tensors, tuned, options.skip)
        for stack in stacks:
            work.add_stack(stack)
            done += stack.nbytes
            progress(done, total)
        for before, after in rest:
            if not any(fnmatch.fnmatchcase(after.name, pattern) for pattern in options.skip):
                work.add(before, after)
            done += after.nbytes
            progress(done, total)
    except BaseException:
        work.spool.close()
        raise
    for name in pairs.only_base:
        work.left_out[name] = "exists only in the base"
    return work.adapter(base, tuned), work.report(base, tuned)


class _Extraction:
    def __init__(self, options: ExtractOptions, config: dict[str, Any], tied: str | None) -> None:
        self.options, self.tied = options, tied
        self.model_type, self.family = config.get("model_type"), family_of(config)
        self.spool = Spool()
        self.deltas: dict[str, LoraDelta] = {}
        self.replacements: dict[str, DenseTensor] = {}
        self.modules: list[ExtractedModule] = []
        self.left_out: dict[str, str] = {}
        self.notes: list[str] = []
        self.unchanged = 0
        self.resized = False

    def add(self, base: LazyTensor | None, tuned: LazyTensor) -> None:
        """Compare one tensor with its base."""
        name = tuned.name
        if base is None:
            self.left_out[name] = "exists only in the fine-tune"
        elif base.shape != tuned.shape:
            self._reshaped(base, tuned)
        elif _alike(base, tuned):
            self.unchanged += 1
        elif base.dtype not in PRECISIONS or tuned.dtype not in PRECISIONS:
            self.left_out[name] = f"changed, but is not real-valued ({tuned.dtype})"
        elif kind_of(name) in self.family.refused_leaves | self.family.read_leaves:
            self._replace(base, tuned)  # a delta would be refused in PEFT, or without effect
        elif (len(tuned.shape) == 2 and name.endswith(".weight")) or len(tuned.shape) == 3:
            self._low_rank(base, tuned)
        else:
            self._replace(base, tuned)
        for tensor in (base, tuned):
            if tensor is not None:
                tensor.release()

    def add_stack(self, stack: Stack) -> None:
        """Compare experts that transformers fuses into one parameter."""
        changed = [
            not _alike(base, tuned)
            for expert in stack.experts
            for base, tuned in zip(expert.base, expert.tuned, strict=True)
        ]
        if any(changed):
            differences = [Difference(expert.base, expert.tuned) for expert in stack.experts]
            self._fit(stack.name, differences, stack.experts[0].tuned[0], "linear")
        else:
            self.unchanged += len(changed)
        for expert in stack.experts:
            for tensor in (*expert.base, *expert.tuned):
                tensor.release()

    def _reshaped(self, base: LazyTensor, tuned: LazyTensor) -> None:
        if tuned.name in per_token({tuned.name: tuned}) and base.shape[1:] == tuned.shape[1:]:
            whole = tuned if isinstance(tuned, DenseTensor) else dequantized(tuned)
            self.replacements[tuned.name] = whole
            if tuned.name == self.tied:
                self.replacements[HEAD] = replace(whole, name=HEAD)
            before, after = base.shape[0], tuned.shape[0]
            self.notes.append(
                f"{tuned.name} {'grew' if before < after else 'shrank'} from {before} to {after} "
                "rows and is replaced in full: loraformat merge resizes the base; in PEFT "
                f"model.resize_token_embeddings({after}) is needed before loading the adapter"
            )
            self.resized = True
        else:
            sizes = "x".join(map(str, base.shape)), "x".join(map(str, tuned.shape))
            self.left_out[tuned.name] = f"changed its shape from {sizes[0]} to {sizes[1]}"

    def _replace(self, base: LazyTensor, tuned: LazyTensor) -> None:
        is_stack = len(tuned.shape) > 2 and kind_of(tuned.name) not in self.family.read_leaves
        if is_stack or not isinstance(tuned, DenseTensor):
            self.left_out[tuned.name] = "changed, and is neither a matrix nor a vector"
        elif Difference([base], [tuned]).is_zero():
            self.unchanged += 1
        else:
            self.replacements[tuned.name] = tuned

    def _low_rank(self, base: LazyTensor, tuned: LazyTensor) -> None:
        experts = tuned.shape[0] if len(tuned.shape) == 3 else 1
        differences = [Difference([base], [tuned], expert) for expert in range(experts)]
        self._fit(tuned.name, differences, tuned, self._orientation(tuned))

    def _fit(
        self,
        name: str,
        differences: list[Difference],
        tuned: LazyTensor,
        orientation: _Orientation,
    ) -> None:
        """Add the delta of one tensor, or of a parameter composed of several."""
        parts = [fit(difference, self.options) for difference in differences]
        total = sum(part.squared_norm for part in parts)
        if not total:
            self.unchanged += 1
            return
        rank = max(part.rank for part in parts)
        padded = [part.padded(rank) for part in parts]
        dtype = numpy_dtype(self._dtype(tuned))
        rounding = [lora.rounding_error(b, a, dtype) for b, a in padded]
        self.modules.append(_module(name, rank, parts, rounding))
        if not rank:
            return
        stacked = name != tuned.name or len(tuned.shape) == 3
        self._add_delta(name, padded, orientation, dtype=self._dtype(tuned), stacked=stacked)
        if name == self.tied:
            self._add_delta(HEAD, padded, "linear", dtype=self._dtype(tuned))
            self.notes.append(
                f"the head is tied to {name}: the adapter changes both. PEFT computes this "
                "correctly, but its merge applies each change twice; loraformat merge does not"
            )

    def _add_delta(
        self,
        target: str,
        pairs: list[Pair],
        orientation: _Orientation,
        *,
        dtype: str,
        stacked: bool = False,
    ) -> None:
        if orientation == "transposed":  # the tensor is Dᵀ = (B A)ᵀ
            pairs = [(a.T, b.T) for b, a in pairs]
        b, a = (numpy.stack(factors) for factors in zip(*pairs, strict=True))
        if not stacked:
            b, a = b[0], a[0]
        module = target.removesuffix(".weight")
        self.deltas[target] = LoraDelta(
            target,
            self.spool.put(f"{module}.lora_A.weight", a, dtype),
            self.spool.put(f"{module}.lora_B.weight", b, dtype),
            1.0,
            orientation,
            alpha=float(a.shape[-2]),
        )

    def _dtype(self, tuned: LazyTensor) -> str:
        """Return the dtype of a tensor's factors."""
        if self.options.dtype:
            return parse_weight_dtype(self.options.dtype)
        return tuned.dtype if tuned.dtype in WEIGHT_DTYPES.values() else "F32"

    def _orientation(self, tensor: LazyTensor) -> _Orientation:
        if len(tensor.shape) == 3:
            turned = self.family.transposed_experts
        else:
            embedding = _EMBEDDING.search(tensor.name.removesuffix(".weight"))
            turned = bool(embedding) or is_conv1d(tensor.name, self.model_type)
        return "transposed" if turned else "linear"

    def adapter(self, base: Checkpoint, tuned: Checkpoint) -> Adapter:
        """Return the adapter."""
        if not self.deltas and not self.replacements:
            self.spool.close()
            raise InputError(
                f"does not differ from {printable(base.path)} in anything an adapter can represent",
                path=tuned.path,
            )
        for module in self._saved_modules():  # PEFT wants all of a module that it replaces
            bias = tuned.tensors.get(f"{module}.bias")
            if isinstance(bias, DenseTensor):
                self.replacements.setdefault(bias.name, bias)
        return Adapter(
            path=tuned.path,
            format="extracted",
            deltas=self.deltas,
            replacements=self.replacements,
            config={"modules_to_save": self._saved_modules() or None},
            base_model=base.provenance.repo or str(base.path),
            files=tokenizer_files(tuned.files) if self.resized else (),
            sources=(*base.sources, *tuned.sources),
            notes=tuple(self.notes),
            close=self.spool.close,
        )

    def _saved_modules(self) -> list[str]:
        """Return the replaced modules, for ``modules_to_save``."""
        modules = {name.removesuffix(".weight") for name in self.replacements}
        return sorted(m for m in modules if f"{m}.weight" in self.replacements)

    def report(self, base: Checkpoint, tuned: Checkpoint) -> ExtractionReport:
        """Return the report."""
        total = sum(module.norm**2 for module in self.modules)
        kept = sum(module.norm**2 * module.captured for module in self.modules)
        return ExtractionReport(
            base=str(base.path),
            tuned=str(tuned.path),
            target="",
            modules=self.modules,
            replaced=sorted(self.replacements),
            unchanged=self.unchanged,
            left_out=dict(sorted(self.left_out.items())),
            parameters=sum(delta.parameters for delta in self.deltas.values()),
            captured=kept / total if total else 1.0,
            notes=[*self.notes, *self._remarks()],
        )

    def _remarks(self) -> Iterator[str]:
        if capped := sum(module.capped for module in self.modules):
            yield f"{capped} modules would need more than rank {self.options.max_rank} (--max-rank)"
        if silent := sum(not module.rank for module in self.modules):
            yield f"{silent} modules differ only by rounding noise and were omitted"
        single = [
            d for d in self.deltas.values() if ".experts." in d.target and len(d.a.shape) == 2
        ]
        if single:
            yield (
                f"{len(single)} deltas belong to individual experts under their checkpoint names; "
                "transformers fuses experts in memory, and PEFT may not find them"
            )


def _module(name: str, rank: int, parts: list[Fit], rounding: list[float]) -> ExtractedModule:
    total = sum(part.squared_norm for part in parts)
    kept = sum(part.kept * (1 - r**2) for part, r in zip(parts, rounding, strict=True))
    captured = min(kept / total, 1.0)
    return ExtractedModule(
        target=name,
        rank=rank,
        captured=captured,
        error=(1 - captured) ** 0.5,
        norm=total**0.5,
        noise=max(part.edge for part in parts),
        capped=any(part.capped for part in parts),
    )


def _alike(base: LazyTensor, tuned: LazyTensor) -> bool:
    """Tell whether two tensors have the same dtype and bytes."""
    if type(base) is not type(tuned) or base.dtype != tuned.dtype:
        return False
    one, other = _raw(base), _raw(tuned)
    return one.keys() == other.keys() and all(same_bytes(one[part], other[part]) for part in one)


def _raw(tensor: LazyTensor) -> dict[str, memoryview]:
    loaded = tensor.load()
    return {"": loaded} if isinstance(loaded, memoryview) else loaded.by_suffix()
