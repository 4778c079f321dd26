"""Setup of a run: base, data and adapter opened and checked before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

from loraformat.chat_templates import process as template_process
from loraformat.errors import InputError, ResourceError, UsageError
from loraformat.hub import resolve
from loraformat.train.batch import Batch
from loraformat.train.data.batch_plan import DataPosition
from loraformat.train.data.dataset import Dataset, open_data
from loraformat.train.data.options import DataOptions
from loraformat.train.data.row_sources import is_local
from loraformat.train.data.tokenizer import TextEncoder, open_tokenizer
from loraformat.train.engine.meta_model import text_config
from loraformat.train.loop import memory
from loraformat.train.loop.distributed import World
from loraformat.train.opening import load
from loraformat.train.run.memory_plan import MemoryBudget
from loraformat.train.run.options import TrainOptions
from loraformat.train.run.text_generation import chat_ids, plain_ids, room_for

if TYPE_CHECKING:
    from loraformat.train.model import TrainableModel

__all__ = ["Inputs", "check_device", "check_vocabulary", "open_inputs", "open_model", "with_length"]

#: What the process takes that renders chat templates, where the system does not say (bytes).
_TEMPLATES = 60_000_000
#: What `Dataset.prompt_format` says of data that no chat template writes.
_WITHOUT_TEMPLATE = (None, "{prompt}{completion}")
Progress = Callable[[int, int], None]
_DTYPES: dict[str, torch.dtype | str] = {
    "fastest": "fastest",
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}


@dataclass(slots=True)
class Inputs:
    """A model and its data.

    Attributes
    ----------
    options : TrainOptions
        As they take effect.
    model, encoder, data, held_out, budget
    steps, batches : int
        Of the whole run; micro-batches on this rank.
    trained_too : int
        Rows of the held-out data that are also in the training data.
    prompts : list of list of int
        The tokens of each prompt, written as the data are.
    """

    options: TrainOptions
    model: TrainableModel
    encoder: TextEncoder
    data: Dataset
    held_out: Dataset | None
    steps: int
    batches: int
    budget: MemoryBudget
    trained_too: int
    prompts: list[list[int]]

    def stream(self, place: dict[str, Any]) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Yield micro-batches from a place on, each with the place behind it."""
        start = DataPosition.from_json(place) if place else None
        epochs = self.options.epochs if self.options.steps is None else None
        for batch, cursor in self.data.batches(start, epochs=epochs):
            yield batch, cursor.to_json()


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises
    ------
    UsageError
        If it is no device that is known here.
    ResourceError
        If there is no such GPU.
    """
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device is {device!r}, wanted cpu, cuda or cuda:N") from None
    if kind.type not in ("cpu", "cuda"):
        raise UsageError(f"device is {device!r}, wanted cpu, cuda or cuda:N")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            f"there is no GPU {device}: torch {torch.__version__} sees {torch.cuda.device_count()}",
            hint="train with --device cpu, or install a torch for CUDA",
        )


def open_model(options: TrainOptions, *, to_train: bool = True) -> TrainableModel:
    """Open the bundle, and what is trained on it; or, for evaluation, a base in any format.

    Raises
    ------
    InputError
        If the base is no bundle, or no model, a target is unknown, or the adapter does not fit.
    """
    path = resolve(options.base).path
    check_device(options.device)
    return load(
        path,
        lora=options.lora() if to_train else None,
        adapter=options.adapter or None,
        device=options.device,
        device_memory=options.device_memory,
        compute_dtype=_DTYPES.get(options.compute_dtype),
        activation_memory=options.activation_memory,
        original=options.original or None,
        allow_base_mismatch=options.allow_base_mismatch,
        to_train=to_train,
    )


def open_inputs(options: TrainOptions, world: World, progress: Progress) -> Inputs:
    """Open the model and the data.

    Raises
    ------
    LoraFormatError
        If they are not sound, or do not fit each other.
    """
    if not options.data:
        raise UsageError("no training data given", hint="give them after the base")
    with ExitStack() as opened:
        model = opened.enter_context(open_model(options))
        options = with_length(model, options)
        encoder = open_tokenizer(model.tokenizer_directory, options.chat_template or None)
        check_vocabulary(model, encoder)
        read = partial(open_data, progress=progress, rank=world.rank, world=world.size)
        data = read(options.data, encoder.tokenizer, _settings(options, options.data))
        held_out = None
        if options.eval:
            settings = _settings(options, options.eval, shuffle=False)
            held_out = read(options.eval, encoder.tokenizer, settings)
        steps, batches = _count(data, options)
        trained_too = 0 if held_out is None else held_out.rows_also_in(data)
        prompts = _prompts(model, encoder, data, options.prompt)
        templates = _template_process([data] if held_out is None else [data, held_out])
        budget = MemoryBudget.of(model, options, map(len, prompts), templates)
        model.activation_memory = budget.plan.kept
        opened.pop_all()
    return Inputs(
        options, model, encoder, data, held_out, steps, batches, budget, trained_too, prompts
    )


def _template_process(sets: Iterable[Dataset]) -> int:
    """Return the bytes that the process holds which renders conversations, if there are any."""
    if not any(one.audit.rendered for one in sets):
        return 0
    number = template_process.shared().number
    return (number and memory.resident_of(number)) or _TEMPLATES


def _prompts(
    model: TrainableModel, encoder: TextEncoder, data: Dataset, prompts: tuple[str, ...]
) -> list[list[int]]:
    """Return the tokens of prompts, as users' messages where the data are conversations."""
    if not prompts:
        return []
    write = plain_ids if data.prompt_format() in _WITHOUT_TEMPLATE else chat_ids
    found = [write(encoder, prompt) for prompt in prompts]
    for ids in found:
        room_for(model.config, len(ids))
    return found


def _settings(options: TrainOptions, names: tuple[str, ...], **other: Any) -> DataOptions:
    """Return how some of the data become batches.

    Where these are files and the others are on the Hub, subset and split are meant for those.
    """
    if all(map(is_local, names)) and not all(map(is_local, (*options.data, *options.eval))):
        usual = DataOptions()
        other |= {"subset": usual.subset, "split": usual.split}
    return options.data_options(**other)


def _count(data: Dataset, options: TrainOptions) -> tuple[int, int]:
    if options.steps is not None:
        return options.steps, options.steps * options.grad_accum
    batches = sum(data.batches_in(epoch) for epoch in range(options.epochs))
    return ceil(batches / options.grad_accum), batches


def with_length(model: TrainableModel, options: TrainOptions) -> TrainOptions:
    """Return the options with a row's length that the model takes.

    Raises
    ------
    UsageError
        If the one that is asked for is longer.
    """
    context = getattr(text_config(model.config), "max_position_embeddings", None)
    if options.seq_len is None:
        length = DataOptions().seq_len
        return replace(options, seq_len=min(length, context) if context else length)
    if context and options.seq_len > context:
        raise UsageError(
            f"seq-len is {options.seq_len}, and the model takes {context} tokens",
            hint=f"use --seq-len {context}",
        )
    return options


def check_vocabulary(model: TrainableModel, encoder: TextEncoder) -> None:
    """Refuse a tokenizer that knows more tokens than the model.

    Raises
    ------
    InputError
    """
    known, needed = int(text_config(model.config).vocab_size), len(encoder.tokenizer)
    if needed > known:
        raise InputError(
            f"its tokenizer knows {needed} tokens, and the model {known}: they do not belong "
            "together",
            path=model.bundle.checkpoint.path,
            hint="copy the tokenizer files of the model that the bundle was made from there",
        )
