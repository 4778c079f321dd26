"""Reading a GGUF model as a lazy checkpoint.

Tensors stored as F32, F16 or BF16 keep their type. Those of block types are dequantized when
they are loaded, bit for bit as ggml does, and rounded to BF16 (at an error of 0.17 %) unless
another type is asked for, or one that holds them exactly: F32.
Gemma's norms become F32, so that 1 + w comes back exactly.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from loraformat.errors import InputError, LoraFormatError, UnsupportedError
from loraformat.model import config_json
from loraformat.model.checkpoint import CarriedFile, Checkpoint, DenseTensor, Provenance
from loraformat.model.quantization_history import from_text
from loraformat.model.rows import RowReader, RowSource
from loraformat.model.tied_head import HEAD, untied_config
from loraformat.nf4.kernels.cast import cast
from loraformat.tensors.arrays import Array, array_bytes, array_view, numpy_dtype
from loraformat.tensors.dtypes import TORCH_NAMES
from loraformat.tensors.lazy_sequence import Deferred
from loraformat_converters.gguf import tokenizers
from loraformat_converters.gguf.architectures import (
    Architecture,
    Config,
    TensorMapping,
    named_by,
    of_config,
    of_gguf,
    to_huggingface,
)
from loraformat_converters.gguf.architectures.decoder import has_own_head
from loraformat_converters.gguf.architectures.metadata import float_tensor
from loraformat_converters.gguf.architectures.transforms import (
    IDENTITY,
    HeadOrder,
    MinusOne,
    Transpose,
)
from loraformat_converters.gguf.base.general_keys import (
    CONFIG_KEY,
    FINGERPRINT_KEY,
    GENERATION_KEY,
    QUANTIZED_KEY,
)
from loraformat_converters.gguf.base.model_card import card_file, left_out
from loraformat_converters.gguf.base.pooling import pooling_key, without_pooling
from loraformat_converters.gguf.container.reader import GGUFFile, open_gguf
from loraformat_converters.gguf.container.types import GGMLType, ValueType
from loraformat_converters.gguf.quantization.blocks import dequantize

if TYPE_CHECKING:
    from loraformat.plugins import ReadOptions

__all__ = ["read"]

_PLAIN = ("F32", "F16", "BF16")


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Open a base.

    Parameters
    ----------
    path : Path
        The file, or any part of a split one.
    options : ReadOptions
        ``config`` replaces what would be inferred, ``dtype`` is that of dequantized tensors.

    Raises
    ------
    UnsupportedError
        If it is an adapter, or of an architecture that is not known.
    InputError
        If it is damaged, or the config is not that of this file.
    """
    gguf = open_gguf(path)
    try:
        return _checkpoint(gguf, options)
    except BaseException:
        gguf.close()
        raise


def _checkpoint(gguf: GGUFFile, options: ReadOptions) -> Checkpoint:
    if gguf.text("general.type", "model") == "adapter":
        raise UnsupportedError("is an adapter, not a model", path=gguf.path)
    architecture = named_by(gguf)
    raw = _config(gguf, architecture, options.config)
    given = options.config is not None
    _, config = of_gguf(gguf) if raw is None else _of_config(gguf, raw, given=given)
    shapes = {name: tensor.shape for name, tensor in gguf.tensors.items()}
    try:
        recipes = to_huggingface(architecture, config, shapes)
    except LoraFormatError as error:
        error.path = error.path or str(gguf.path)
        raise
    decoded = options.dtype or ("F32" if options.exact else "BF16")
    sources = [_Source(gguf, recipe, decoded) for recipe in recipes]
    if raw is None:
        raw = _derived(gguf, architecture, config, _main_dtype(sources))
    # A vocabulary takes seconds, and who only looks at the weights has no use for it.
    tokenizer = cache(lambda: tokenizers.files(gguf))
    return Checkpoint(
        path=gguf.path,
        provenance=Provenance(
            "gguf",
            fingerprint=_fingerprint(gguf),
            quantized=from_text(_said(gguf, QUANTIZED_KEY)),
        ),
        tensors={source.recipe.name: source.tensor() for source in sources},
        config=raw,
        files=Deferred(lambda: _files(gguf, tokenizer()[0])),
        left_behind=Deferred(lambda: _left_behind(gguf, tokenizer()[1])),
        sources=gguf.sources,
        close=gguf.close,
    )


def _files(gguf: GGUFFile, tokenizer: Iterable[CarriedFile]) -> Iterator[CarriedFile]:
    if generation := _generation(gguf):
        yield CarriedFile.of("generation_config.json", generation)
    yield from tokenizer
    yield from card_file(gguf, ours=any(key.startswith("loraformat.") for key in gguf.metadata))


def _left_behind(gguf: GGUFFile, missing: str | None) -> Iterator[str]:
    if missing is not None:
        yield missing
    yield from without_pooling(gguf)
    yield from left_out(gguf)


def _fingerprint(gguf: GGUFFile) -> str | None:
    """Return that of the bundle that the file was made of; None if it names none."""
    text = _said(gguf, FINGERPRINT_KEY)
    return text if re.fullmatch("[0-9a-f]{64}", text) else None


def _said(gguf: GGUFFile, key: str) -> str:
    """Return the text of a key that anybody may have written; nothing if it is no text."""
    value = gguf.metadata.get(key)
    return gguf.text(key) if value and value.type is ValueType.STRING else ""


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor to be: loads its one part, undoes what the file has done to it."""

    gguf: GGUFFile
    recipe: TensorMapping
    dequantized: str

    @property
    def dtype(self) -> str:
        if isinstance(self.recipe.transform, MinusOne):
            return "F32"
        kind = self.gguf.tensors[self.recipe.parts[0].source].type.name
        return kind if kind in _PLAIN else self.dequantized

    def tensor(self) -> DenseTensor:
        source, recipe = self.recipe.parts[0].source, self.recipe
        release, kind = self.gguf.releaser(source), self.gguf.tensors[source].type
        stored = None if kind.name in _PLAIN else (kind.name, kind.row_bytes(prod(recipe.shape)))
        load = self._load()
        return DenseTensor(recipe.name, self.dtype, recipe.shape, load, release, stored)

    def _load(self) -> Callable[[], memoryview]:
        """Return what loads the tensor, by rows where rows stay near each other."""
        part, transform = self.recipe.parts[0], self.recipe.transform
        kind = self.gguf.tensors[part.source].type
        if kind.name == self.dtype and transform is IDENTITY:
            return self._view
        if len(part.shape) < 2 or isinstance(transform, Transpose):
            return self._whole
        # Rows change places within heads only, so that whole heads are decoded.
        heads = transform.heads if isinstance(transform, HeadOrder) else part.shape[0]
        height = max(part.shape[0] // max(heads, 1), 1)
        open_rows = partial(self._rows, kind, part.shape, height)
        return RowSource(self.dtype, self.recipe.shape, open_rows, height)

    def _view(self) -> memoryview:
        """Return the stored bytes of the part."""
        (part,) = self.recipe.parts
        stored = self.gguf.tensors[part.source]
        row_bytes = stored.type.row_bytes(part.shape[-1])
        rows = stored.nbytes // row_bytes
        count = part.shape[0] if len(part.shape) > 1 else 1
        first = part.start if len(part.shape) > 1 else 0
        if part.expert is not None:
            first += part.expert * (rows // stored.shape[0])
        whole = self.gguf.load(part.source)
        if len(part.shape) == 1:  # a vector may be a slice of a fused one
            size = row_bytes // part.shape[0] if stored.type.block == 1 else 0
            return whole[part.start * size :][: part.shape[0] * size] if size else whole
        return whole[first * row_bytes : (first + count) * row_bytes]

    def _whole(self) -> memoryview:
        part = self.recipe.parts[0]
        values = self._values(self._view(), self.gguf.tensors[part.source].type, part.shape)
        result = numpy.empty(self.recipe.shape, numpy_dtype(self.dtype))
        cast(self.recipe.transform.rows(values, 0, len(result)), result)
        return array_bytes(result)

    def _rows(self, kind: GGMLType, shape: tuple[int, ...], height: int) -> RowReader:
        view, row_bytes, transform = self._view(), kind.row_bytes(shape[1]), self.recipe.transform

        def read(start: int, stop: int) -> Array:
            first, last = start // height * height, min(-(-stop // height) * height, shape[0])
            part = view[first * row_bytes : last * row_bytes]
            values = self._values(part, kind, (last - first, shape[1]), threads=1)
            here = transform
            if isinstance(transform, HeadOrder):
                here = HeadOrder((last - first) // height, transform.interleaved)
            return here.rows(values, start - first, stop - first)

        return read

    def _values(
        self,
        view: memoryview,
        kind: GGMLType,
        shape: tuple[int, ...],
        *,
        threads: int | None = None,
    ) -> Array:
        if kind.name == self.dtype:
            return array_view(view, self.dtype, shape)
        name = self.recipe.parts[0].source
        return dequantize(view, kind, shape, name, threads=threads)


def _main_dtype(sources: list[_Source]) -> str:
    """Return the type of most numbers."""
    counts: Counter[str] = Counter()
    for source in sources:
        counts[source.dtype] += prod(source.recipe.shape)
    return counts.most_common(1)[0][0]


def _config(gguf: GGUFFile, architecture: Architecture, given: bytes | None) -> bytes | None:
    """Return the config that was given, or the one in the file if it still describes it."""
    if given is not None:
        given = _with_head(gguf, _text_alone(given, architecture))
        if difference := _difference(gguf, architecture, given):
            raise InputError(
                f"the config is not that of this model: {difference}",
                path=gguf.path,
                hint="name the config.json that the file was made with, or leave out --config",
            )
        return given
    if CONFIG_KEY not in gguf.metadata:
        return None
    try:
        stored = _with_head(gguf, _text_alone(gguf.text(CONFIG_KEY).encode(), architecture))
        if _unexplained(gguf, architecture, stored) or _difference(gguf, architecture, stored):
            return None  # somebody has edited the metadata, which llama.cpp computes by
        return stored
    except LoraFormatError:
        return None


def _text_alone(raw: bytes, architecture: Architecture) -> bytes:
    """Return the config of the language model within one that also sees."""
    values = config_json.parse(raw)
    text = values.get("text_config")
    if not isinstance(text, dict):
        return raw
    model_type, name = next(iter(architecture.models.items()))
    carried: dict[str, Any] = {k: values[k] for k in ("dtype", "torch_dtype") if k in values}
    return _json({**carried, **text, "model_type": model_type, "architectures": [name]})


def _of_config(gguf: GGUFFile, raw: bytes, *, given: bool) -> tuple[Architecture, Config]:
    """Return what a config says; one that lay in the file may have lost its head before."""
    names = [HEAD] if "output.weight" in gguf.tensors else [] if given else ["embed_tokens.weight"]
    return of_config(config_json.parse(raw), names)


def _with_head(gguf: GGUFFile, raw: bytes) -> bytes:
    """Return a config that does not tie an output head which the file has of its own."""
    _, config = of_config(config_json.parse(raw), [HEAD])
    return untied_config(raw) if config.tied and has_own_head(gguf) else raw


def _difference(gguf: GGUFFile, architecture: Architecture, raw: bytes) -> str | None:
    """Say where a config and the file's metadata differ, None if they do not."""
    record, config = of_config(config_json.parse(raw))
    if record is not architecture:
        return f"it is of architecture {record.name}, and the file of {architecture.name}"
    rows = gguf.tensors["token_embd.weight"].shape[0]
    if rows != config.integer("vocab_size"):
        return f"vocab_size is {config.integer('vocab_size')}, and the file has {rows} tokens"
    for key, value in architecture.metadata(config).items():
        if key in gguf.metadata and not _same(gguf.metadata[key].value, value.value):
            return f"it says {key} {value.value}, and the file {gguf.metadata[key].value}"
    return _different_factors(gguf, architecture, config)


def _unexplained(gguf: GGUFFile, architecture: Architecture, raw: bytes) -> set[str]:
    """Return the architecture's keys in a file of ours that its config would not have made."""
    _, config = of_config(config_json.parse(raw))
    prefix = f"{architecture.name}."
    return {key for key in gguf.metadata if key.startswith(prefix)}.difference(
        architecture.metadata(config), [pooling_key(architecture.name)]
    )


def _same(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-6 * abs(one)
    return one == other


def _different_factors(gguf: GGUFFile, architecture: Architecture, config: Config) -> str | None:
    wanted = architecture.tensors(config)
    for name in architecture.extras:
        if (name in wanted) != (name in gguf.tensors):
            return f"one of them has {name}, the other not"
        if name in wanted:
            pairs = zip(wanted[name], float_tensor(gguf, name), strict=False)
            if any(abs(one - other) > 1e-4 * abs(one) for one, other in pairs):
                return f"they have different {name}"
    return None


def _derived(gguf: GGUFFile, architecture: Architecture, config: Config, dtype: str) -> bytes:
    values = architecture.config(gguf) | _special_tokens(gguf) | {"dtype": TORCH_NAMES[dtype]}
    values.pop("experts", None)
    values["architectures"] = [architecture.models[values["model_type"]]]
    return _json(values)


def _special_tokens(gguf: GGUFFile) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "padding": "pad"}
    found = {name: _token(gguf, key) for key, name in names.items()}
    return {f"{name}_token_id": number for name, number in found.items() if number >= 0}


def _token(gguf: GGUFFile, kind: str) -> int:
    """Return the number of a special token, a negative one if there is none."""
    return gguf.integer(f"tokenizer.ggml.{kind}_token_id", -1)


def _generation(gguf: GGUFFile) -> bytes:
    if GENERATION_KEY in gguf.metadata:
        return gguf.text(GENERATION_KEY).encode()
    tokens: dict[str, Any] = dict(_special_tokens(gguf))
    found = dict.fromkeys(_token(gguf, kind) for kind in ("eos", "eot", "eom"))
    ends = [number for number in found if number >= 0]
    if len(ends) > 1:
        tokens["eos_token_id"] = ends
    return _json(tokens) if tokens else b""


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
