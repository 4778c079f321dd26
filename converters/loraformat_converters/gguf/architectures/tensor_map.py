"""Mapping of tensors and their parts between Hugging Face and GGUF.

A recipe is made from names and shapes alone. Every tensor of a checkpoint is used once or is
named as unused, and every tensor that the architecture must have is there: nothing is dropped
silently, in neither direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.families.expert_names import spelled_in_memory
from loraformat.families.tensor_names import spelled_in_2019
from loraformat.tensors.arrays import Array
from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.record import Architecture
from loraformat_converters.gguf.architectures.transforms import IDENTITY, Transform
from loraformat_converters.gguf.architectures.weights import (
    ExpertWeightName,
    Sizes,
    WeightName,
    sizes,
)

__all__ = ["TensorMap", "TensorMapping", "TensorSlice", "to_gguf", "to_huggingface"]

_NO_HEAD = "write it as safetensors, for transformers or vLLM: to a directory, --to safetensors"
_EMBEDS = (
    "complete the checkpoint; if it is an embedding model, name the class without a head in "
    'config.json, such as "architectures": ["LlamaModel"]'
)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A matrix (or vector) within a stored tensor.

    Attributes
    ----------
    source : str
        The tensor's name.
    shape : tuple of int
        Of the part.
    expert : int or None
        Index along the first of three dimensions.
    start : int
        The first row, where the part is some rows of the matrix.
    """

    source: str
    shape: tuple[int, ...]
    expert: int | None = None
    start: int = 0

    def of(self, tensor: Array) -> Array:
        """Return the part, a view."""
        matrix = tensor if self.expert is None else tensor[self.expert]
        return matrix[self.start : self.start + self.shape[0]]


@dataclass(frozen=True, slots=True)
class TensorMapping:
    """How one tensor is made.

    Attributes
    ----------
    name : str
    shape : tuple of int
        As numpy counts.
    parts : tuple of TensorSlice
        Their rows, one part after the other, are the rows of the tensor.
    transform : Transform
        Applied to each part.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorSlice, ...]
    transform: Transform = IDENTITY

    @property
    def sources(self) -> list[str]:
        """Names of the tensors that it is made of, each once."""
        return list(dict.fromkeys(part.source for part in self.parts))

    def rows_of(self, part: TensorSlice) -> int:
        """Return how many rows a part gives."""
        return self.transform.shape(part.shape)[0]


@dataclass(slots=True)
class TensorMap:
    """All tensors of a conversion, and those of the source that the target has no room for."""

    tensors: list[TensorMapping] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def to_gguf(architecture: Architecture, config: Config, shapes: Shapes) -> TensorMap:
    """Return how a Hugging Face model's tensors make those of a GGUF file.

    The embedding comes first, then layer by layer, then the rest.

    Raises
    ------
    InputError
        If a tensor is missing or has another shape than its fellows.
    UnsupportedError
        If llama.cpp has no place for a tensor.
    """
    base = _base(architecture, config, shapes)
    _check_head(architecture, config)
    used: set[str] = set()
    recipes = TensorMap()
    for row, number in _places(architecture, config):
        recipe = (
            _experts(row, number, config, shapes, base)
            if isinstance(row, ExpertWeightName)
            else _single(row, number, config, shapes, base)
        )
        if recipe is not None:
            recipes.tensors.append(recipe)
            used.update(recipe.sources)
    _check_leftovers(architecture, config, base, shapes, used, recipes)
    _check_dimensions(architecture, config, {r.name: r.shape for r in recipes.tensors})
    return recipes


def _places(
    architecture: Architecture, config: Config
) -> Iterator[tuple[WeightName | ExpertWeightName, int | None]]:
    """Walk over the table in execution order."""
    rows = list(architecture.rows(config))
    outside = [row for row in rows if isinstance(row, WeightName) and not row.in_layers]
    last = [row for row in outside if row.gguf.startswith("output")]
    yield from ((row, None) for row in outside if row not in last)
    for number in range(config.layers):
        yield from ((row, number) for row in rows if row not in outside)
    yield from ((row, None) for row in last)
    if architecture.head is not None and not config.tied:
        yield architecture.head, None


def _base(architecture: Architecture, config: Config, shapes: Shapes) -> str:
    first = next(row for row, _ in _places(architecture, config) if isinstance(row, WeightName))
    for base in architecture.bases:
        if first.hf.format(base=base) in shapes:
            return base
    raise InputError(
        f"holds no tensor {first.hf.format(base=architecture.bases[0])}",
        hint="is config.json that of these weights?",
    )


def _check_head(architecture: Architecture, config: Config) -> None:
    """Refuse a head of its own where llama.cpp computes with the embedding instead."""
    if architecture.generates and architecture.head is None and not config.tied:
        raise UnsupportedError(
            f"the output head is not the embedding, with which llama.cpp's {architecture.name} "
            "computes, whatever the file holds",
            hint=_NO_HEAD,
        )


def _heads(architecture: Architecture, base: str) -> list[str]:
    """Names that the output head may have."""
    return ["lm_head.weight", base.removesuffix("model.") + "lm_head.weight"]


def _single(
    row: WeightName, number: int | None, config: Config, shapes: Shapes, base: str
) -> TensorMapping | None:
    names = [row.hf.format(base=base, layer=number)]
    if row.gguf == "output.weight":
        names += [base.removesuffix("model.") + names[0]]
    # In memory transformers 5 calls mixtral's blocks differently than in files.
    names += [spelled_in_memory(name) for name in names]
    names += [spelled_in_2019(name) for name in names]
    found = next((name for name in names if name in shapes), None)
    if found is None:
        if row.required:
            raise InputError(
                f"tensor {printable(names[0])} is missing",
                hint=_EMBEDS if row.gguf == "output.weight" else None,
            )
        return None
    part, transform = _whole(found, shapes, 1, 2), row.transform(config)
    _check_heads(found, part.shape, transform)
    name = row.gguf.format(layer=number)
    return TensorMapping(name, transform.shape(part.shape), (part,), transform)


def _whole(name: str, shapes: Shapes, *dimensions: int) -> TensorSlice:
    """Return all of a tensor, which must be there, hold numbers and have so many dimensions."""
    if name not in shapes:
        raise InputError(f"tensor {printable(name)} is missing")
    if len(shapes[name]) not in dimensions or not prod(shapes[name]):
        raise InputError(f"tensor {printable(name)} has shape {list(shapes[name])}")
    return TensorSlice(name, shapes[name])


def _check_heads(name: str, shape: tuple[int, ...], transform: Transform) -> None:
    heads = getattr(transform, "heads", 0)
    if heads and shape[0] % (2 * heads):
        raise InputError(f"tensor {printable(name)} has {shape[0]} rows for {heads} heads")


def _experts(
    row: ExpertWeightName, number: int | None, config: Config, shapes: Shapes, base: str
) -> TensorMapping:
    names = [
        row.hf.format(base=base, layer=number, expert=expert) for expert in range(config.experts)
    ]
    fused = row.fused.format(base=base, layer=number)
    if names[0] in shapes:
        parts = tuple(_whole(name, shapes, 2) for name in names)
    elif (found := next((n for n in (fused, fused + ".weight") if n in shapes), "")) != "":
        parts = _stack(found, shapes[found], config.experts, row.half)
    else:
        raise InputError(f"tensor {printable(names[0])} is missing")
    if len({part.shape for part in parts}) > 1:
        raise InputError(f"the experts of {printable(names[0])} have different shapes")
    shape = (len(parts), *parts[0].shape)
    return TensorMapping(row.gguf.format(layer=number), shape, parts)


def _stack(
    name: str, shape: tuple[int, ...], experts: int, half: int | None = None
) -> tuple[TensorSlice, ...]:
    """Return the matrices of a tensor with three dimensions, or one half of the rows of each."""
    if len(shape) != 3 or shape[0] != experts or not prod(shape):
        raise InputError(
            f"tensor {printable(name)} has shape {list(shape)}, wanted {experts} matrices"
        )
    rows, start = shape[1], 0
    if half is not None:
        if rows % 2:
            raise InputError(f"tensor {printable(name)} has {rows} rows, which have no half")
        rows //= 2
        start = half * rows
    return tuple(TensorSlice(name, (rows, shape[2]), expert, start) for expert in range(experts))


def _check_leftovers(
    architecture: Architecture,
    config: Config,
    base: str,
    shapes: Shapes,
    used: set[str],
    recipes: TensorMap,
) -> None:
    for name in shapes:
        if name in used:
            continue
        inner = name.removeprefix(base)
        outside = base and not name.startswith(base)
        if inner.startswith(architecture.unused):
            recipes.unused.append(name)
        elif name in _heads(architecture, base) and config.tied:
            continue  # a copy of the embedding, which transformers ignores, too
        elif inner.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")):
            continue  # constants that old checkpoints carry
        elif outside and _is_tower(name):
            recipes.unused.append(name)
        else:
            raise UnsupportedError(
                f"tensor {printable(name)} has no place in llama.cpp's {architecture.name}"
            )


def _is_tower(name: str) -> bool:
    """Tell whether a tensor belongs to what sees or hears."""
    kinds = ("vision", "visual", "multi_modal_projector", "audio", "embed_vision", "mm_")
    return any(part.startswith(kinds) for part in name.split("."))


def to_huggingface(
    architecture: Architecture, config: Config, shapes: Shapes
) -> list[TensorMapping]:
    """Return how a GGUF file's tensors make those of a Hugging Face model; see `to_gguf`.

    Experts become one tensor each, as transformers stores them. A fused ``attn_qkv`` of a
    model with three projections is cut.
    """
    _check_dimensions(architecture, config, shapes)
    used: set[str] = set(architecture.extras)
    if architecture.head is not None and config.tied:
        used.add(architecture.head.gguf)  # a copy of the embedding
    recipes: list[TensorMapping] = []
    base = architecture.base_of(config)
    for row, number in _places(architecture, config):
        name = row.gguf.format(layer=number)
        if isinstance(row, ExpertWeightName):
            experts = _unstacked(row, name, number, config, shapes, base)
            recipes += experts
            used.update(part.source for recipe in experts for part in recipe.parts)
            continue
        part = _stored(row, name, config, shapes)
        if part is None:
            continue
        used.add(part.source)
        undo = row.transform(config).inverse
        _check_heads(name, part.shape, undo)
        target = row.hf.format(base=base, layer=number)
        recipes.append(TensorMapping(target, undo.shape(part.shape), (part,), undo))
    for name in shapes:
        if name not in used:
            raise UnsupportedError(
                f"tensor {printable(name)} has no place in a Hugging Face model of this kind "
                f"({architecture.name})"
            )
    return recipes


def _stored(row: WeightName, name: str, config: Config, shapes: Shapes) -> TensorSlice | None:
    if name in shapes:
        return _whole(name, shapes, 1, 2)
    for place, kind in enumerate(("q", "k", "v")):
        fused = name.replace(f".attn_{kind}.", ".attn_qkv.")
        if fused != name and fused in shapes:
            return _cut(fused, shapes[fused], place, config)
    if row.required:
        raise InputError(f"tensor {printable(name)} is missing")
    return None


def _cut(name: str, shape: tuple[int, ...], place: int, config: Config) -> TensorSlice:
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    if not shape or shape[0] != queries + 2 * keys:
        raise InputError(f"tensor {printable(name)} has shape {list(shape)}")
    start = (0, queries, queries + keys)[place]
    return TensorSlice(name, (keys if place else queries, *shape[1:]), None, start)


def _unstacked(
    row: ExpertWeightName, name: str, number: int | None, config: Config, shapes: Shapes, base: str
) -> list[TensorMapping]:
    if name in shapes:
        parts = _stack(name, shapes[name], config.experts)
    else:
        parts = _single_experts(row, name, number, config, shapes)
    return [
        TensorMapping(row.hf.format(base=base, layer=number, expert=expert), part.shape, (part,))
        for expert, part in enumerate(parts)
    ]


def _single_experts(
    row: ExpertWeightName, name: str, number: int | None, config: Config, shapes: Shapes
) -> tuple[TensorSlice, ...]:
    """Return the experts of a file of early 2024, which has a tensor for each of them."""
    names = [row.single.format(layer=number, expert=expert) for expert in range(config.experts)]
    if not any(one in shapes for one in names):
        raise InputError(f"tensor {printable(name)} is missing")
    matrices = tuple(_whole(one, shapes, 2) for one in names)
    if len({part.shape for part in matrices}) > 1:
        raise InputError(f"the experts {printable(names[0])}, ... have different shapes")
    return matrices


def _check_dimensions(architecture: Architecture, config: Config, shapes: Shapes) -> None:
    """Compare the tensors of a GGUF file with what the hyperparameters promise.

    A file that did not fit would be refused by llama.cpp when it is loaded, and by transformers
    filled with random numbers. What is not known is not checked.
    """
    promised = _promised(architecture, config)
    for name, shape in shapes.items():
        kind, _, suffix = name.rpartition(".")
        module = kind.rpartition(".")[2]
        if module.isdecimal():  # blk.0.ffn_up.3.weight: one expert of an old file
            stacked = promised.get(f"{kind.split('.')[-2]}_exps")
            wanted = None if stacked is None else stacked[1:]
        else:
            wanted = promised.get(module)
        if wanted is None:
            continue
        if suffix == "bias":
            wanted = wanted[:1]
        if len(shape) != len(wanted) or any(
            size not in (None, found) for size, found in zip(wanted, shape, strict=True)
        ):
            said = ["any" if size is None else size for size in wanted]
            raise InputError(
                f"tensor {printable(name)} has shape {list(shape)}, and the hyperparameters say "
                f"[{', '.join(map(str, said))}]"
            )


def _promised(architecture: Architecture, config: Config) -> dict[str, Sizes]:
    """Return the shape of each weight, by the last part of its module's name."""
    rows = [row for row in architecture.rows(config) if row.gguf.endswith(".weight")]
    rows += [architecture.head] if architecture.head else []
    shapes = {"attn_qkv": "qkv hidden"}  # some files have three projections in one tensor
    shapes |= {row.gguf.split(".")[-2]: row.shape for row in rows}
    return {module: sizes(shape, config) for module, shape in shapes.items()}
