"""Writing a model to a GGUF file.

Vectors, norms, routers, positions and token types are F32; all other weights are of the type
that was asked for, F16 where their rows do not fill its blocks. Below 8 bits the output head
(of tied models the embedding) is Q8_0: it costs little and matters most. Weights are
transformed, rounded and written a tile of rows at a time, and what rounding loses is measured
on the way. NF4 weights are decoded to float32 first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import numpy

from loraformat.errors import InputError, UnsupportedError
from loraformat.model import config_json
from loraformat.model.checkpoint import Checkpoint, LazyTensor
from loraformat.model.written import WrittenModel, WrittenShards
from loraformat.plugins import Forecast
from loraformat_converters.gguf import tokenizers
from loraformat_converters.gguf.architectures import (
    Config,
    TensorMap,
    TensorMapping,
    TensorSlice,
    of_config,
    to_gguf,
)
from loraformat_converters.gguf.architectures.transforms import Transpose
from loraformat_converters.gguf.base.general_keys import general_keys
from loraformat_converters.gguf.base.matrix_rows import TensorReader
from loraformat_converters.gguf.base.model_card import without_place
from loraformat_converters.gguf.base.pooling import pooling
from loraformat_converters.gguf.container.types import GGMLType
from loraformat_converters.gguf.container.values import GGUFValue
from loraformat_converters.gguf.container.writer import PlannedTensor, file_size, write_gguf
from loraformat_converters.gguf.quantization.blocks import storable_type
from loraformat_converters.gguf.quantization.rounding import Loss, Watched, rounded

if TYPE_CHECKING:
    from pathlib import Path

    from loraformat.plugins import WriteOptions
    from loraformat.storage.atomic_output import AtomicOutput

__all__ = ["estimate", "write"]

_LOW = {GGMLType.Q5_1, GGMLType.Q5_0, GGMLType.Q4_1, GGMLType.Q4_0}
_ALWAYS_F32 = ("ffn_gate_inp.weight", "position_embd.weight", "token_types.weight")
_FLOATS = ("F64", "F32", "F16", "BF16")


def write(checkpoint: Checkpoint, publication: AtomicOutput, options: WriteOptions) -> WrittenModel:
    """Write a model as ``publication.file_name``.

    Parameters
    ----------
    checkpoint : Checkpoint
        With a ``config.json`` and a tokenizer.
    publication : AtomicOutput
        Of a single file.
    options : WriteOptions
        ``dtype`` and ``pre_tokenizer`` are heeded.

    Raises
    ------
    UnsupportedError
        If llama.cpp cannot run such a model, or would compute something else.
    InputError
        If the model is incomplete or damaged.
    """
    plan = _plan(checkpoint, options)
    record = write_gguf(publication, plan.metadata, plan.tensors)
    for name in plan.recipes.unused:
        options.progress(checkpoint.tensors[name].nbytes)
    return WrittenModel(
        WrittenShards(tensors=plan.loss.records(checkpoint.tensors)),
        {publication.file_name: record},
        [*plan.notes, *_loss_notes(plan, checkpoint)],
    )


def estimate(checkpoint: Checkpoint, target: Path, options: WriteOptions) -> Forecast:
    """Return the size of the file that `write` would write, and what it would say but losses.

    Raises
    ------
    UnsupportedError, InputError
        As `write`, for all that does not take the numbers to see.
    """
    plan = _plan(checkpoint, options)
    return Forecast(file_size(plan.metadata, plan.tensors, target), tuple(plan.notes))


@dataclass(frozen=True, slots=True)
class _Plan:
    """A file of the type that was asked for, before any number is read.

    The loss is filled while the tensors are written.
    """

    kind: GGMLType
    recipes: TensorMap
    metadata: dict[str, GGUFValue]
    tensors: list[PlannedTensor]
    notes: list[str]
    loss: Loss


def _plan(checkpoint: Checkpoint, options: WriteOptions) -> _Plan:
    if checkpoint.config is None:
        raise UnsupportedError(
            "has no config.json, which says what the tensors are",
            path=checkpoint.path,
            hint="put it in the directory of the weights",
        )
    architecture, config = of_config(config_json.parse(checkpoint.config), checkpoint.tensors)
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors.values()}
    recipes = to_gguf(architecture, config, shapes)
    kind = GGMLType[(options.dtype or "f16").upper()]
    token_keys, token_notes = _tokenizer(checkpoint, config, recipes, options)
    pooled, pooling_notes = pooling(checkpoint.files, architecture.name)
    metadata = general_keys(checkpoint, architecture.name, kind, token_keys)
    metadata |= architecture.metadata(config) | token_keys | pooled
    work = _Work(checkpoint, options, Loss())
    types = {recipe.name: _type(recipe, kind, config.tied) for recipe in recipes.tensors}
    planned = [_small(name, values) for name, values in architecture.tensors(config).items()]
    planned += [work.planned(recipe, types[recipe.name]) for recipe in recipes.tensors]
    notes = architecture.notes(config) + _headless_notes(config, pooled) + token_notes
    notes += _notes(kind, types, recipes)
    notes += pooling_notes + without_place(checkpoint.files)
    return _Plan(kind, recipes, metadata, planned, notes, work.loss)


def _tokenizer(
    checkpoint: Checkpoint, config: Config, recipes: TensorMap, options: WriteOptions
) -> tuple[dict[str, GGUFValue], list[str]]:
    vocabulary = next(r.shape[0] for r in recipes.tensors if r.name == "token_embd.weight")
    if vocabulary != config.integer("vocab_size"):
        raise InputError(
            f"the embedding has {vocabulary} rows, and config.json says vocab_size "
            f"{config.integer('vocab_size')}",
            path=checkpoint.path,
        )
    return tokenizers.read(checkpoint, vocabulary=vocabulary, pre=options.pre_tokenizer)


def _type(recipe: TensorMapping, kind: GGMLType, tied: bool) -> GGMLType:
    name = recipe.name
    if (
        len(recipe.shape) < 2
        or name.endswith("_norm.weight")
        or not name.endswith(".weight")
        or name.endswith(_ALWAYS_F32)
    ):
        return GGMLType.F32
    if kind in _LOW and name in ("output.weight", "token_embd.weight" if tied else ""):
        kind = GGMLType.Q8_0
    return storable_type(kind, recipe.shape[-1])


def _small(name: str, values: list[float]) -> PlannedTensor:
    vector = numpy.array(values, numpy.float32)
    return PlannedTensor(name, vector.shape, GGMLType.F32, lambda: [vector.tobytes()])


@dataclass
class _Work:
    """Loads, transforms and rounds; at most one tensor of the source is loaded at a time."""

    checkpoint: Checkpoint
    options: WriteOptions
    loss: Loss

    def planned(self, recipe: TensorMapping, kind: GGMLType) -> PlannedTensor:
        for name in recipe.sources:
            tensor = self.checkpoint.tensors[name]
            if tensor.dtype not in _FLOATS:
                raise UnsupportedError(f"tensor {name} is of type {tensor.dtype}, not of floats")
        return PlannedTensor(recipe.name, recipe.shape, kind, lambda: self._chunks(recipe, kind))

    def _chunks(self, recipe: TensorMapping, kind: GGMLType) -> Iterator[bytes]:
        source: TensorReader | None = None
        before: TensorReader | None = None
        for part in recipe.parts:
            tensor = self.checkpoint.tensors[part.source]
            if source is None or source.name != part.source:  # the parts of experts share one
                source = before = None  # or two of them were in memory
                source = _opened(tensor, recipe)
                watched = self.options.watch and self.options.watch.before(part.source)
                before = _opened(watched, recipe) if watched else None
            yield from self._rounded(recipe, part, source, before, kind)
            self.options.progress(prod(part.shape) * tensor.nbytes // tensor.count)
            if part is recipe.parts[-1] or len(recipe.sources) > 1:
                tensor.release()

    def _rounded(
        self,
        recipe: TensorMapping,
        part: TensorSlice,
        source: TensorReader,
        before: TensorReader | None,
        kind: GGMLType,
    ) -> Iterator[bytes]:
        rows, watched = recipe.rows_of(part), None
        read = partial(recipe.transform.rows, source.part(part))
        if before is not None and self.options.watch is not None:
            watched = Watched(self.options.watch, partial(recipe.transform.rows, before.part(part)))
        dtype = self.checkpoint.tensors[part.source].dtype
        exact = kind is GGMLType.F32 or (kind.name == dtype and source.dtype.itemsize == 2)
        length = prod(part.shape) // max(rows, 1)
        return rounded(read, rows, length, kind, part.source, None if exact else self.loss, watched)


def _opened(tensor: LazyTensor, recipe: TensorMapping) -> TensorReader:
    matrix = len(recipe.parts[0].shape) == 2
    return TensorReader(tensor, by_rows=matrix and not isinstance(recipe.transform, Transpose))


def _headless_notes(config: Config, pooled: Mapping[str, GGUFValue]) -> list[str]:
    if not config.headless:
        return []
    how = "" if pooled else " --pooling mean, cls or last, which its files do not say"
    return [
        f"the model has no output head: it is for embeddings (llama-server --embeddings{how}), and "
        "what llama.cpp would generate with its embedding as a head means nothing"
    ]


def _notes(kind: GGMLType, types: Mapping[str, GGMLType], recipes: TensorMap) -> list[str]:
    notes = []
    small = [name for name, one in types.items() if kind.block > 1 and one is GGMLType.F16]
    if small:
        notes.append(
            f"{len(small)} weights are F16: their rows do not fill the blocks of {kind.name} "
            f"({small[0]}, ...)"
        )
    if recipes.unused:
        notes.append(
            f"{len(recipes.unused)} tensors have no place in a GGUF base and were left out "
            f"({recipes.unused[0]}, ...)"
        )
    return notes


def _loss_notes(plan: _Plan, checkpoint: Checkpoint) -> list[str]:
    if plan.kind not in _LOW:
        return []
    steps = checkpoint.provenance.quantized
    of_nf4 = bool(steps) and "NF4" in steps[-1].types
    better = ", and llama-quantize writes q4_k_m from an f16 file" if of_nf4 else ""
    return [
        f"{plan.kind.name} keeps the weights to {plan.loss.total:.1%} only (relative RMS, "
        f"measured; the mean error of a tensor is {abs(plan.loss.largest_bias):.2%} of its RMS at "
        f"most); q8_0 keeps them to about 0.5%{better}"
    ]
