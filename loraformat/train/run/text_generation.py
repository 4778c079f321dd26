"""Text generation: encoding of the prompt, sampling, streaming, and the memory that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraformat.chat_templates.process import TemplateRefusalError
from loraformat.errors import InputError, UsageError, printable
from loraformat.runtimes.chat import GENERATION_NAME
from loraformat.train.data.chat import ChatRenderer
from loraformat.train.data.tokenizer import TextEncoder
from loraformat.train.loop.evaluation import evaluating

__all__ = [
    "SAMPLE",
    "GenerationOptions",
    "TextStream",
    "chat_ids",
    "continuation",
    "generation_bytes",
    "ids_of",
    "inner_width",
    "plain_ids",
    "room_for",
    "stop_tokens",
    "turn_end",
]

_FLOAT = 4
#: Tensors of the size of the logits while the next token is chosen: as they come, as float32, and
#: what the choice is made from.
_LOGITS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How text is drawn.

    Attributes
    ----------
    max_tokens : int
        Maximum number of new tokens.
    temperature : float
        Logits are divided by it; 0 is greedy decoding.
    top_p : float
        Tokens are drawn from the likeliest ones whose probabilities add up to this (Holtzman
        2020); 1 from all.
    seed : int
    """

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"max-tokens is {self.max_tokens}, wanted at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}, wanted a number from 0")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}, wanted a share above 0, up to 1")


#: How a run generates a sample from each of its prompts.
SAMPLE = GenerationOptions(max_tokens=64, temperature=0.0)


class TextStream:
    """Streamer for transformers' ``generate``: turns tokens into text as they are generated.

    `tell` is called with each new piece of text; `end` is a text that ends what is told, and is no
    part of it.

    Attributes
    ----------
    tokens : list of int
        Those that were generated.
    """

    def __init__(self, tokenizer: Any, tell: Callable[[str], None], end: str | None = None) -> None:
        self._tokenizer, self._tell, self._end = tokenizer, tell, end
        self.tokens: list[int] = []
        self._told = ""
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then one token at a time."""
        if self._prompt:
            self._prompt = False
            return
        self.tokens += value.reshape(-1).tolist()
        text = self.text()
        # Half of a character of several bytes shows as U+FFFD until its other half comes.
        if not text.endswith("\ufffd") and text.startswith(self._told):
            self._say(self._certain(text))

    def end(self) -> None:
        """Pass on the rest of the text."""
        if (text := self.text()).startswith(self._told):
            self._say(text)

    def text(self) -> str:
        """Return what was generated so far."""
        text = str(self._tokenizer.decode(self.tokens, skip_special_tokens=True))
        return text if self._end is None else text.partition(self._end)[0]

    def _certain(self, text: str) -> str:
        """Return a text without what may be the first part of its end."""
        end = self._end or ""
        longest = range(min(len(end) - 1, len(text)), 0, -1)
        return text[: len(text) - next((n for n in longest if text.endswith(end[:n])), 0)]

    def _say(self, text: str) -> None:
        if len(text) > len(self._told):
            self._tell(text[len(self._told) :])
            self._told = text


def stop_tokens(directory: Path, tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: those of the model's generation config, else EOS."""
    from transformers import GenerationConfig

    found: Any = None
    if (directory / GENERATION_NAME).is_file():
        try:
            found = GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id
        except Exception as error:
            raise InputError(
                f"cannot be read: {' '.join(str(error).split())}",
                path=directory / GENERATION_NAME,
            ) from None
    return sorted({*ids_of(found), *ids_of(tokenizer.eos_token_id)})


def ids_of(value: Any) -> list[int]:
    """Return what an ``eos_token_id`` holds as a list.

    Examples
    --------
    >>> ids_of(2), ids_of([2, 3]), ids_of(None), ids_of(True)
    ([2], [2, 3], [], [])
    """
    return [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]


def continuation(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    options: GenerationOptions,
    *,
    stops: list[int],
    end: str | None = None,
    device: str | torch.device = "cpu",
    tell: Callable[[str], None] = lambda text: None,
) -> TextStream:
    """Generate text from a prompt, and return the stream with its tokens.

    The model may be anything with ``generate`` of transformers; nothing of it changes. `stops` are
    tokens that end the text, and `end` is a text that ends it and is no single token. `tell` is
    called with each new piece of text.

    Raises
    ------
    InputError
        If the prompt is empty, or leaves no room in the model's context.
    """
    room = room_for(model.config, len(prompt))
    stream = TextStream(tokenizer, tell, end)
    draws = options.temperature > 0
    ids = torch.tensor([prompt], device=device)
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(options.seed)
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), streamer=stream,
            max_new_tokens=min(options.max_tokens, room), eos_token_id=stops or None,
            pad_token_id=stops[0] if stops else 0, do_sample=draws,
            temperature=options.temperature if draws else None,
            top_p=options.top_p if draws else None, top_k=0 if draws else None,
            **({} if end is None else {"stop_strings": [end], "tokenizer": tokenizer}),
        )  # fmt: skip
    return stream


def room_for(config: Any, length: int) -> int:
    """Return how many tokens a model can generate after a prompt of a length (tokens).

    Raises
    ------
    InputError
        If the prompt is empty, or leaves no room in the model's context.
    """
    if not length:
        raise InputError("the prompt has no token", hint="give some text")
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context and length >= context:
        raise InputError(
            f"the prompt has {length} tokens, and the model takes {context}",
            hint="give a shorter one",
        )
    return int(context - length) if context else 1 << 30


def plain_ids(encoder: TextEncoder, prompt: str) -> list[int]:
    """Return the tokens of a plain prompt."""
    return [*encoder.prefix, *encoder.tokenize(prompt).ids]


def chat_ids(encoder: TextEncoder, prompt: str, system: str | None = None) -> list[int]:
    """Return the tokens of a user's message that the model is to answer.

    Raises
    ------
    UsageError
        If there is no chat template.
    InputError
        If it refuses the message.
    """
    if not encoder.has_template:
        raise UsageError(
            f"{encoder.name}: its tokenizer has no chat template", hint="leave --chat out"
        )
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return encoder.tokenize(encoder.render(messages, None, prompt=True)).ids
    except TemplateRefusalError as error:
        raise InputError(
            f"its chat template rejects the prompt: {printable(error)}",
            path=encoder.name,
            hint="leave --chat out" if system is None else "try it without --system",
        ) from None


def turn_end(encoder: TextEncoder, stops: Collection[int]) -> str | None:
    """Return the text that the chat template puts behind an answer, where no token ends it.

    None if one of the `stops`, tokens that end texts, is in it, or the template does more than to
    put pieces around words.
    """
    found = ChatRenderer(encoder).format()
    if found is None:
        return None
    end = found.turn_end
    return None if not end or set(encoder.tokenize(end).ids) & set(stops) else end


def generation_bytes(config: Any, prompt: int, new: int, number_bytes: int = _FLOAT) -> int:
    """Return a bound on what one continuation holds, besides the weights (bytes).

    Keys and values of all layers for prompt and new tokens, twice: they grow by a copy for each
    token, and what is freed is in pieces that are too small for the next. One layer's at a time
    are there for each of the heads that share them. The prompt goes through at once: what a layer
    holds for it, as in a step without gradients. `config` is that of the language model; `prompt`
    and `new` are tokens, and `number_bytes` is the size of one number in an activation.

    Examples
    --------
    >>> import transformers
    >>> config = transformers.LlamaConfig(
    ...     hidden_size=512, intermediate_size=1408, num_hidden_layers=12, vocab_size=64000,
    ...     num_attention_heads=8,
    ... )
    >>> generation_bytes(config, 100, 64), generation_bytes(config, 1000, 64)
    (23306000, 165761600)
    """
    hidden, tokens = _attention_width(config), prompt + new
    cache = 2 * tokens * int(config.num_hidden_layers) * _cached_width(config) * number_bytes
    inside = prompt * (13 * hidden + 5 * inner_width(config)) * number_bytes
    repeated = 2 * tokens * hidden * number_bytes
    logits = _LOGITS_AT_ONCE * int(config.vocab_size) * _FLOAT
    return cache + repeated + inside + logits + _scores(config, prompt, number_bytes)


def inner_width(config: Any) -> int:
    """Return a model's widest feed-forward size."""
    return _number(config, "intermediate_size") or 4 * int(config.hidden_size)


def _cached_width(config: Any) -> int:
    """Return how many numbers a layer keeps of a token.

    Keys and values of all their heads, or what both are computed from (latent attention).
    """
    heads = _number(config, "num_key_value_heads") or _number(config, "num_attention_heads") or 1
    if latent := _number(config, "kv_lora_rank"):
        return latent + _number(config, "qk_rope_head_dim")
    shared = getattr(config, "multi_query", False)  # by all heads, but for Falcon's newer models
    if shared and not getattr(config, "new_decoder_architecture", False):
        heads = 1
    return 2 * heads * _head_width(config)


def _attention_width(config: Any) -> int:
    """Return the widest of what goes through a layer besides its feed-forward part."""
    heads = _number(config, "num_attention_heads") or 1
    return max(int(config.hidden_size), heads * _head_width(config))


def _head_width(config: Any) -> int:
    """Return the widest head's size."""
    heads = _number(config, "num_attention_heads") or 1
    names = ("head_dim", "global_head_dim", "qk_head_dim", "v_head_dim")
    widest = max(_number(config, name) for name in names)
    return widest or -(-int(config.hidden_size) // heads)


def _scores(config: Any, prompt: int, number_bytes: int) -> int:
    """Return what attention holds of all pairs of tokens, where it computes them all at once."""
    if getattr(config, "_attn_implementation", None) != "eager":
        return prompt * prompt  # a mask
    return (_number(config, "num_attention_heads") or 1) * prompt**2 * 2 * (number_bytes + _FLOAT)


def _number(config: Any, name: str) -> int:
    """Return a size, the largest where each layer has its own; 0 if the config has none."""
    value = getattr(config, name, None)
    return max((n for n in (value if isinstance(value, list | tuple) else [value]) if n), default=0)
