"""Options of the training data."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Literal, get_args, get_type_hints

from loraformat.errors import UsageError

__all__ = ["DataOptions"]

_SMALLEST = {"seq_len": 2, "batch_size": 1, "seed": 0}


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How rows become batches; see `loraformat.train.run.options.TrainOptions`, too.

    Attributes
    ----------
    seq_len : int
        Most tokens in a row of a batch. Text is cut into pieces of it.
    batch_size : int
        Rows in a batch, on each rank.
    train_on : {"completions", "all"}
        Of ``{"text"}`` every token is a target either way.
    over_length : {"refuse", "drop", "split", "truncate", "truncate-start"}
        What to do with conversations and completions of more than ``seq_len`` tokens. Of the parts
        that one is split into, all but the first lack what is before them.
    packing : bool
        Put several samples into one row, each in its own segment. Otherwise a row is one
        sample, and a batch is made of samples of similar length.
    shuffle, seed : bool, int
        Another order in each epoch; otherwise the order of the files.
    bad_rows : {"refuse", "skip"}
    split_text : {"document", "paragraphs"}
        Paragraphs are what is between blank lines.
    chat_template : str, os.PathLike or None
        File with a Jinja chat template, instead of the tokenizer's own.
    subset, split : str
        Of a dataset on the Hub; no subset is the default one.

    Raises
    ------
    UsageError

    Examples
    --------
    >>> DataOptions(seq_len=1)
    Traceback (most recent call last):
    loraformat.errors.UsageError: seq-len is 1, wanted at least 2
    """

    seq_len: int = 512
    batch_size: int = 1
    train_on: Literal["completions", "all"] = "completions"
    over_length: Literal["refuse", "drop", "split", "truncate", "truncate-start"] = "refuse"
    packing: bool = True
    shuffle: bool = True
    seed: int = 0
    bad_rows: Literal["refuse", "skip"] = "refuse"
    split_text: Literal["document", "paragraphs"] = "document"
    chat_template: str | PathLike[str] | None = None
    subset: str = ""
    split: str = "train"

    def __post_init__(self) -> None:
        for name, smallest in _SMALLEST.items():
            if getattr(self, name) < smallest:
                raise _out_of_range(name, getattr(self, name), f"at least {smallest}")
        hints = get_type_hints(DataOptions)
        for name in ("train_on", "over_length", "bad_rows", "split_text"):
            words = get_args(hints[name])
            if getattr(self, name) not in words:
                raise _out_of_range(name, repr(getattr(self, name)), f"one of {', '.join(words)}")


def _out_of_range(name: str, value: object, wanted: str) -> UsageError:
    """Return an error that names an option as flags and YAML keys are written."""
    return UsageError(f"{name.replace('_', '-')} is {value}, wanted {wanted}")
