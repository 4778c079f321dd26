"""The chat template beside an adapter that was trained with another one than its base's.

Whoever prompts the adapter otherwise than it was trained gets less than was trained. So the
template goes with it, in the file in which transformers keeps one, and is found there again.
"""

from __future__ import annotations

from loraformat.carried_tokenizer import CarriedTokenizer
from loraformat.checkpoint import CarriedFile
from loraformat.ops.adapters import open_adapter
from loraformat.train.data.dataset import Dataset
from loraformat.train.data.tokenizer import TextEncoder
from loraformat.train.run.options import TrainOptions

__all__ = ["passed_over", "template_files", "template_of"]

_NAME = "chat_template.jinja"


def template_files(
    options: TrainOptions, encoder: TextEncoder, data: Dataset
) -> tuple[CarriedFile, ...]:
    """Return what shall lie beside the adapter: the template that was named, if it was used.

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
    return (CarriedFile(_NAME, len(text), lambda: text),)


def passed_over(options: TrainOptions, encoder: TextEncoder, data: Dataset) -> bool:
    """Tell whether an adapter that is trained on was prompted otherwise than it is now.

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
