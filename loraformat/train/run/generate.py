"""A try-out: text from a bundle, with or without an adapter."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from loraformat.train.data.tokenizer import open_tokenizer
from loraformat.train.run.adapter_template import stops_of, template_of
from loraformat.train.run.options import TrainOptions
from loraformat.train.run.prompt import chat_ids, plain_ids, turn_end
from loraformat.train.run.setup import check_vocabulary, open_base
from loraformat.train.run.text_generation import GenerationOptions, continuation, stop_tokens

__all__ = ["Generation", "generate"]


@dataclass(frozen=True, slots=True)
class Generation:
    """A prompt and what a model wrote on.

    Attributes
    ----------
    prompt, text : str
    tokens : int
        New ones.
    seconds : float
    """

    prompt: str
    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed, the prompt's time included."""
        return self.tokens / max(self.seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """Return it for ``json.dumps``."""
        return asdict(self)


def generate(
    options: TrainOptions,
    prompt: str,
    drawn: GenerationOptions,
    *,
    chat: bool = False,
    system: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Let a model write on.

    Parameters
    ----------
    options : TrainOptions
        With base, and adapter if there is one.
    prompt : str
    drawn : GenerationOptions
    chat : bool
        Put the prompt into a chat template, as a user's message: that which lies beside the
        adapter, else the model's.
    system : str, optional
        The message before it.
    tell : callable
        Called with each new piece of text.

    Raises
    ------
    LoraFormatError
        If something is not sound, or does not fit together.
    """
    with open_base(options) as model:
        directory = model.directory
        encoder = open_tokenizer(model.tokenizer_directory)
        check_vocabulary(model, encoder)
        if chat and options.adapter and (own := template_of(options.adapter)):
            encoder.tokenizer.chat_template = own
        ids = chat_ids(encoder, prompt, system) if chat else plain_ids(encoder, prompt)
        stops = set(stop_tokens(directory, encoder.tokenizer))
        if options.adapter:
            stops.update(stops_of(options.adapter))
        end = turn_end(encoder, stops) if chat else None
        begun = time.monotonic()
        stream = continuation(
            model, encoder.tokenizer, ids, drawn,
            stops=sorted(stops), end=end, device=options.device, tell=tell,
        )  # fmt: skip
        seconds = time.monotonic() - begun
    return Generation(prompt, stream.text(), len(stream.tokens), seconds)
