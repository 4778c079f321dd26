"""Writing an adapter to a GGUF file.

There is one alpha for the whole file. Where it does not give a module's scaling (rsLoRA, alpha
patterns, alpha 0) the rest is folded into B: multiplied in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy

from loraformat.errors import LoraFormatError, UnsupportedError, UsageError
from loraformat.model import config_json
from loraformat.model.adapter import Adapter
from loraformat.model.tied_head import settled
from loraformat.model.tokenizer_files import CarriedTokenizer
from loraformat.nf4.kernels.cast import widened
from loraformat.plugins import Forecast
from loraformat.tensors.arrays import Array, finite
from loraformat_converters.gguf.architectures import of_config
from loraformat_converters.gguf.container.types import GGMLType
from loraformat_converters.gguf.container.values import GGUFValue
from loraformat_converters.gguf.container.writer import PlannedTensor, file_size, write_gguf
from loraformat_converters.gguf.lora.metadata import adapter_keys
from loraformat_converters.gguf.lora.plan import Pair, choose_alpha, plan_pairs
from loraformat_converters.gguf.lora.refusals import refuse_whole
from loraformat_converters.gguf.quantization.blocks import quantized_tiles, storable_type

if TYPE_CHECKING:
    from pathlib import Path

    from loraformat.model.checkpoint import Checkpoint
    from loraformat.plugins import AdapterWriteOptions
    from loraformat.storage.atomic_output import AtomicOutput

__all__ = ["estimate", "write"]

_ALORA = (
    "aLoRA: llama.cpp (build 11549) is active from one token before the invocation tokens, PEFT "
    "from the first of them; with another adapter llama.cpp treats it as a plain LoRA"
)


def write(adapter: Adapter, publication: AtomicOutput, options: AdapterWriteOptions) -> None:
    """Write an adapter as ``publication.file_name``.

    Parameters
    ----------
    adapter : Adapter
    publication : AtomicOutput
        Of a single file.
    options : AdapterWriteOptions
        ``base`` must have a config. ``dtype`` is F32 by default, F16, BF16 or Q8_0; of the
        last, tensors whose rows do not fill its blocks (those of B, mostly) are F16.

    Raises
    ------
    UsageError
        Without a base.
    UnsupportedError
        If llama.cpp cannot apply the adapter, or would compute something else.
    InputError
        If it does not fit the base.
    """
    metadata, tensors, notes = _plan(adapter, options)
    write_gguf(publication, metadata, tensors)
    for note in notes:
        options.note(note)


def estimate(adapter: Adapter, target: Path, options: AdapterWriteOptions) -> Forecast:
    """Return the size of the file that `write` would write, and what it would say.

    Raises
    ------
    UsageError, UnsupportedError, InputError
        As `write`, for all that does not take the numbers of the factors to see.
    """
    metadata, tensors, notes = _plan(adapter, options)
    return Forecast(file_size(metadata, tensors, target), tuple(notes))


def _plan(
    adapter: Adapter, options: AdapterWriteOptions
) -> tuple[dict[str, GGUFValue], list[PlannedTensor], list[str]]:
    """Return metadata, tensors and notes, before any number of a factor is read."""
    base = options.base
    if base is None or base.config is None:
        raise UsageError(
            "a GGUF adapter needs the config.json of its base, which tells the architecture and "
            "the number of heads",
            hint="give it with --base BASE: a bundle, a GGUF file, or a directory with "
            "config.json, with or without weights",
        )
    base, _ = settled(base)
    assert base.config is not None
    try:
        architecture, config = of_config(config_json.parse(base.config), base.tensors)
    except LoraFormatError as error:
        error.path = str(base.path)
        raise
    refuse_whole(adapter, base, architecture, config)
    pairs = plan_pairs(adapter, architecture, config)
    alpha = choose_alpha(pairs)
    kind = GGMLType[options.dtype or "F32"]
    tensors = [tensor for pair in pairs for tensor in _planned(pair, kind, alpha)]
    notes = [_ALORA] if adapter.invocation_tokens else []
    notes += _template_note(adapter, base)
    notes += _notes(pairs, alpha, tensors, kind)
    return adapter_keys(adapter, base, architecture.name, alpha), tensors, notes


def _template_note(adapter: Adapter, base: Checkpoint) -> list[str]:
    """Note that the runtime would use another prompt format than training did."""
    own, there = (CarriedTokenizer(m.files, m.path).chat_templates for m in (adapter, base))
    if "default" not in own or own["default"].rstrip("\n") == there.get("default", "").rstrip("\n"):
        return []
    return [
        "its chat template has no place in the file, and llama.cpp takes the base's: start "
        "llama-server with --chat-template-file chat_template.jinja, the adapter's, or merge"
    ]


def _planned(pair: Pair, kind: GGMLType, alpha: float) -> list[PlannedTensor]:
    a, b = f"{pair.tensor}.lora_a", f"{pair.tensor}.lora_b"
    kind_a, kind_b = (storable_type(kind, shape[-1]) for shape in (pair.a_shape, pair.b_shape))

    def chunks() -> Iterator[bytes | memoryview]:
        yield from quantized_tiles(_finite(pair.b(alpha), b), kind_b, b)
        pair.release()

    return [
        PlannedTensor(a, pair.a_shape, kind_a, lambda: quantized_tiles(pair.a(), kind_a, a)),
        PlannedTensor(b, pair.b_shape, kind_b, chunks),
    ]


def _finite(values: Array, name: str) -> Array:
    if values.dtype != numpy.float64:
        return values
    rounded = widened(values)
    if not finite(rounded):
        raise UnsupportedError(f"tensor {name} does not fit into float32 with its scaling")
    return rounded


def _notes(
    pairs: list[Pair], alpha: float, tensors: list[PlannedTensor], kind: GGMLType
) -> list[str]:
    notes = []
    factors = [pair.factor(delta, alpha) for pair in pairs for _, delta in pair.members]
    if folded := sum(factor != 1 for factor in factors):
        notes.append(
            f"one alpha ({alpha:g}) does not give every scaling: in {folded} of {len(factors)} "
            "deltas the rest was folded into B"
        )
    others = [tensor.name for tensor in tensors if tensor.type is not kind]
    if others:
        notes.append(
            f"{len(others)} of {len(tensors)} tensors are F16: their rows do not fill the blocks "
            f"of {kind.name} ({others[0]}, ...)"
        )
    return notes
