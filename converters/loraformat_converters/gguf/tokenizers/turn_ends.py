"""Stop tokens other than EOS.

transformers has any number of them, in ``generation_config.json``. llama.cpp has places for two
(``eot`` and ``eom``) and knows some by their texts; a file that says the most important one is
understood by other programs, too.
"""

from __future__ import annotations

from loraformat.errors import printable
from loraformat.model.tokenizer_files import CarriedTokenizer
from loraformat_converters.gguf.container.values import GGUFValue

__all__ = ["turn_end_keys"]

#: Texts at which llama.cpp stops whatever the file says: ends of turns, and of other things.
_TURNS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endofturn|>", "<EOT>", "_<EOT>",
    "<|turn_end|>", "<turn|>",
}  # fmt: skip
_OTHERS = {
    "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<|return|>", "<|call|>",
    "<|flush|>", "<|calls|>", "<EOS>", "<end_of_utterance>", "[EOS]", "[EOT]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
}  # fmt: skip
_PLACES = ("eot", "eom")


def turn_end_keys(
    tokenizer: CarriedTokenizer, eos: int | None, texts: list[str]
) -> tuple[dict[str, GGUFValue], list[str]]:
    """Return the keys for tokens that end texts besides EOS, and what they cannot say.

    Raises
    ------
    InputError
        If ``generation_config.json`` is damaged.

    Examples
    --------
    >>> from loraformat.model.checkpoint import CarriedFile
    >>> file = CarriedFile("generation_config.json", 24, lambda: b'{"eos_token_id": [0, 1]}')
    >>> list(turn_end_keys(CarriedTokenizer([file], "m"), 0, ["<eos>", "<|im_end|>"])[0])
    ['tokenizer.ggml.eot_token_id']
    """
    stops = [n for n in dict.fromkeys(tokenizer.stops) if n != eos and 0 <= n < len(texts)]
    unknown = [n for n in stops if texts[n] not in _TURNS | _OTHERS]
    # Where there is room, the end of a turn has the place that is called so.
    turns = [n for n in stops if texts[n] in _TURNS][: max(len(_PLACES) - len(unknown), 0)]
    named = [*turns[:1], *unknown]
    keys = {
        f"tokenizer.ggml.{place}_token_id": GGUFValue.uint(number)
        for place, number in zip(_PLACES, named, strict=False)
    }
    left = [printable(texts[n]) for n in unknown[len(_PLACES) :]]
    if not left:
        return keys, []
    return keys, [
        f"llama.cpp has no place for {len(left)} more tokens that end a text ({', '.join(left)}): "
        "give them as stop strings of a request"
    ]
