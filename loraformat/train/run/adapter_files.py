"""Files of an adapter besides its weights: chat template, stop tokens, facts of its training.

An adapter works best with the prompt format it was trained with. So a template that is not the
base's is stored with it, in the file in which transformers keeps one. Turns may end with another
token than the one that ends the base's texts (Llama 3's ``<|eot_id|>``, ChatML's ``<|im_end|>`` on
a base that knows only documents): a program that waits for that one never stops. So the tokens that
were trained to end turns are in a ``generation_config.json``, where transformers reads them.

The facts are for people, model cards and later evaluations. There is no time of day and no duration
in them: two runs of the same work write the same bytes. The training data is recorded by hash, so
that evaluation on it is noticed.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from loraformat.model.checkpoint import CarriedFile
from loraformat.model.tokenizer_files import CarriedTokenizer
from loraformat.ops.opening.adapter import open_adapter
from loraformat.runtimes.chat import GENERATION_NAME, RECORD_NAME
from loraformat.runtimes.use import TEMPLATE_NAME
from loraformat.train.data.dataset import Dataset
from loraformat.train.data.tokenizer import TextEncoder
from loraformat.train.loop.saved_state import RunState
from loraformat.train.run.options import TrainOptions
from loraformat.train.run.text_generation import ids_of, stop_tokens
from loraformat.version import __version__

__all__ = ["AdapterFiles", "facts_of", "stops_of", "template_of", "trained_on"]


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What a run stores with its adapter where that differs from its base.

    Attributes
    ----------
    options : TrainOptions
    encoder : TextEncoder
        With the template that conversations were written with.
    data : Dataset
        What is trained on. Without a conversation in it no template had a part in the training.
    directory : Path
        The base.
    """

    options: TrainOptions
    encoder: TextEncoder
    data: Dataset
    directory: Path

    def files(self) -> tuple[CarriedFile, ...]:
        """Return the template if one was given and used, and new stop tokens."""
        found = []
        if self.options.chat_template and self.data.audit.rendered:
            text = str(self.encoder.tokenizer.chat_template)
            found.append(CarriedFile.of(TEMPLATE_NAME, text.encode("utf-8")))
        if learned := self.learned_stops():
            ids = [*stop_tokens(self.directory, self.encoder.tokenizer), *learned]
            text = json.dumps({"eos_token_id": ids}, indent=2) + "\n"
            found.append(CarriedFile.of(GENERATION_NAME, text.encode("utf-8")))
        return tuple(found)

    def learned_stops(self) -> list[int]:
        """Return the tokens that end turns in the data and end nothing yet for the base."""
        known = stop_tokens(self.directory, self.encoder.tokenizer)
        before = stops_of(self.options.adapter) if self.options.adapter else []
        return sorted({*self.data.stops, *before} - set(known))

    def has_other_template(self) -> bool:
        """Tell whether a continued adapter was trained with another chat template."""
        if not self.options.adapter or self.options.chat_template or not self.data.audit.rendered:
            return False
        own, used = template_of(self.options.adapter), self.encoder.tokenizer.chat_template
        if isinstance(used, dict):
            used = used.get("default", "")
        return own is not None and own.rstrip("\n") != used.rstrip("\n")


def stops_of(adapter: str) -> list[int]:
    """Return the stop tokens in the generation config of an adapter, a path or a Hub id.

    Raises
    ------
    LoraFormatError
        If it is no adapter, or its generation config is damaged.
    """
    with open_adapter(adapter) as opened:
        found = CarriedTokenizer(opened.files, opened.path).json(GENERATION_NAME)
    return ids_of(found.get("eos_token_id"))


def template_of(adapter: str) -> str | None:
    """Return an adapter's chat template, or None; parameters as in `stops_of`."""
    with open_adapter(adapter) as opened:
        return CarriedTokenizer(opened.files, opened.path).chat_templates.get("default")


def facts_of(
    options: TrainOptions, state: RunState, data: Dataset, held_out: Dataset | None, ranks: int
) -> dict[str, Any]:
    """Return the facts of a run that is done."""
    from transformers import __version__ as transformers_version

    return {
        "data": _described(data),
        "prompt_format": data.prompt_format(),
        "chat": data.chat(),
        "held_out_data": None
        if held_out is None
        else {**_described(held_out), "trained_too": held_out.rows_also_in(data)},
        "steps": state.step,
        "tokens": state.tokens,
        "trained_tokens": state.trained,
        "first_loss": state.first_loss,
        "last_loss": state.last_loss,
        "heldout_before": state.first_eval,
        "heldout_after": state.best_eval if options.best else state.last_eval,
        "best_step": state.best_step,
        "ranks": ranks,
        "settings": options.to_json(),
        "versions": {
            "loraformat": __version__,
            "torch": torch.__version__,
            "transformers": transformers_version,
            "python": platform.python_version(),
        },
    }


def _described(data: Dataset) -> dict[str, Any]:
    audit = data.audit
    return {
        "files": [
            {"name": Path(name).name, "rows": rows, "sha256": _hash_of(Path(name))}
            for name, rows in audit.sources
        ],
        "rows": audit.rows,
        "samples": audit.samples,
        "tokens": audit.tokens,
        "trained_tokens": audit.trained,
        "fingerprint": data.fingerprint,
    }


def _hash_of(path: Path) -> str | None:
    """Return a file's SHA-256; None for what is no file, a dataset on the Hub for example."""
    if not path.is_file():
        return None
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def trained_on(adapter: str, sources: Sequence[tuple[str, int]]) -> list[str]:
    """Say which of some files an adapter's record names as training data, in sentences.

    Files are told apart by their hashes, since the record holds no rows. An adapter without a
    record, or without hashes in it, was trained on something that is not known. `adapter` is a path
    or a Hub id; `sources` are names and rows of what is evaluated.
    """
    with open_adapter(adapter) as opened:
        record = CarriedTokenizer(opened.files, opened.path).json(RECORD_NAME)
    known = set(_hashes(record))
    return [
        f"{Path(adapter).name} was trained on {Path(name).name} ({rows} rows): its loss there is "
        "not a held-out loss"
        for name, rows in sources
        if known and _hash_of(Path(name)) in known
    ]


def _hashes(record: dict[str, Any]) -> Iterator[str]:
    data: Any = record
    for name in ("training", "data", "files"):
        data = data.get(name) if isinstance(data, dict) else None
    for one in data if isinstance(data, list) else []:
        if isinstance(one, dict) and isinstance(one.get("sha256"), str):
            yield one["sha256"]
