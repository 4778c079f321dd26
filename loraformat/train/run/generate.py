"""The verb ``generate``: text from a base, with or without an adapter."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from loraformat.model.report import Report
from loraformat.train.data.tokenizer import open_tokenizer
from loraformat.train.run.adapter_files import stops_of, template_of
from loraformat.train.run.options import TrainOptions
from loraformat.train.run.setup import check_vocabulary, open_model
from loraformat.train.run.text_generation import (
    GenerationOptions,
    chat_ids,
    continuation,
    plain_ids,
    stop_tokens,
    turn_end,
)

__all__ = ["GenerationReport", "generate"]


@dataclass(frozen=True, slots=True, repr=False)
class GenerationReport(Report):
    """A prompt and what a model wrote on.

    Attributes
    ----------
    prompt, text : str
    tokens : int
        New ones.
    """

    _shared: ClassVar[tuple[str, ...]] = ("notes", "seconds")

    prompt: str
    text: str
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Speed, the prompt's time included."""
        return self.tokens / max(self.seconds, 1e-9)


def generate(
    options: TrainOptions,
    prompt: str,
    drawn: GenerationOptions,
    *,
    chat: bool = False,
    system: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> GenerationReport:
    """Generate text; `loraformat.generate` is the public function.

    With `chat`, the chat template that the adapter brings is applied, else the model's. `tell` is
    called with each new piece of text.
    """
    with open_model(options, to_train=False) as model:
        encoder = open_tokenizer(model.tokenizer_directory)
        check_vocabulary(model, encoder)
        if chat and options.adapter and (own := template_of(options.adapter)):
            encoder.tokenizer.chat_template = own
        ids = chat_ids(encoder, prompt, system) if chat else plain_ids(encoder, prompt)
        stops = set(stop_tokens(model.directory, encoder.tokenizer))
        if options.adapter:
            stops.update(stops_of(options.adapter))
        end = turn_end(encoder, stops) if chat else None
        begun = time.monotonic()
        stream = continuation(
            model, encoder.tokenizer, ids, drawn,
            stops=sorted(stops), end=end, device=options.device, tell=tell,
        )  # fmt: skip
        seconds = time.monotonic() - begun
    return GenerationReport(
        prompt, stream.text(), len(stream.tokens), seconds=seconds, notes=model.notes
    )
