"""Chat template and stop tokens of adapters that differ from their base in them.

An adapter works best with the prompt format it was trained with. So a template
that is not the base's goes with it, in the file in which transformers keeps one. Turns may end with
another token than the one that ends the base's texts (Llama 3's ``<|eot_id|>``, ChatML's
``<|im_end|>`` on a base that knows only documents): a reader that waits for that one never stops.
So the tokens that were trained to end turns lie in a ``generation_config.json``, where transformers
looks for them. Both are read from there again.
"""

from __future__ import annotations

import json
from pathlib import Path

from loraformat.model.checkpoint import CarriedFile
from loraformat.model.tokenizer_files import CarriedTokenizer
from loraformat.ops.opening.adapter import open_adapter
from loraformat.runtimes.chat import GENERATION_NAME
from loraformat.runtimes.use import TEMPLATE_NAME
from loraformat.train.data.dataset import Dataset
from loraformat.train.data.tokenizer import TextEncoder
from loraformat.train.run.options import TrainOptions
from loraformat.train.run.text_generation import ids_of, stop_tokens

__all__ = ["learned_stops", "passed_over", "stop_files", "stops_of", "template_files",
           "template_of"]  # fmt: skip


def template_files(
    options: TrainOptions, encoder: TextEncoder, data: Dataset
) -> tuple[CarriedFile, ...]:
    """Return the chat template to store with the adapter, if one was given and used.

    Parameters
    ----------
    options : TrainOptions
    encoder : TextEncoder
        With that template.
    data : Dataset
        What is trained on. Without a conversation in it no template had a part in the training.
    """
    if not options.chat_template or not data.audit.rendered:
        return ()
    text = str(encoder.tokenizer.chat_template).encode("utf-8")
    return (CarriedFile(TEMPLATE_NAME, len(text), lambda: text),)


def learned_stops(
    options: TrainOptions, encoder: TextEncoder, data: Dataset, directory: Path
) -> list[int]:
    """Return the tokens that end turns in the data and end nothing yet for the base.

    Parameters
    ----------
    options, encoder, data
        As in `template_files`.
    directory : Path
        The base.
    """
    known = stop_tokens(directory, encoder.tokenizer)
    before = stops_of(options.adapter) if options.adapter else []
    return sorted({*data.stops, *before} - set(known))


def stop_files(
    options: TrainOptions, encoder: TextEncoder, data: Dataset, directory: Path
) -> tuple[CarriedFile, ...]:
    """Return the generation config to store with the adapter, if it has new stop tokens.

    Parameters
    ----------
    options, encoder, data, directory
        As in `learned_stops`.
    """
    learned = learned_stops(options, encoder, data, directory)
    if not learned:
        return ()
    ids = [*stop_tokens(directory, encoder.tokenizer), *learned]
    text = json.dumps({"eos_token_id": ids}, indent=2).encode("utf-8") + b"\n"
    return (CarriedFile(GENERATION_NAME, len(text), lambda: text),)


def stops_of(adapter: str) -> list[int]:
    """Return the tokens that end a text by what an adapter brings.

    Parameters
    ----------
    adapter : str
        A path, or a Hub id.

    Raises
    ------
    LoraFormatError
        If it is no adapter, or its generation config is damaged.
    """
    with open_adapter(adapter) as opened:
        found = CarriedTokenizer(opened.files, opened.path).json(GENERATION_NAME)
    return ids_of(found.get("eos_token_id"))


def passed_over(options: TrainOptions, encoder: TextEncoder, data: Dataset) -> bool:
    """Tell whether a continued adapter was trained with another chat template.

    Parameters
    ----------
    options, encoder, data
        As in `template_files`.
    """
    if not options.adapter or options.chat_template or not data.audit.rendered:
        return False
    own, used = template_of(options.adapter), encoder.tokenizer.chat_template
    if isinstance(used, dict):
        used = used.get("default", "")
    return own is not None and own.rstrip("\n") != used.rstrip("\n")


def template_of(adapter: str) -> str | None:
    """Return the chat template that an adapter brings, or None.

    Parameters
    ----------
    adapter : str
        A path, or a Hub id.

    Raises
    ------
    LoraFormatError
        If it is no adapter, or its template is damaged.
    """
    with open_adapter(adapter) as opened:
        return CarriedTokenizer(opened.files, opened.path).chat_templates.get("default")
