"""The verb ``eval``: held-out loss of a base, and of the base with each of some adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from loraformat.model.report import Report
from loraformat.train.batch import Batch
from loraformat.train.data.dataset import Dataset, open_data
from loraformat.train.data.tokenizer import open_tokenizer
from loraformat.train.loop.evaluation import HeldOutLoss, held_out_loss
from loraformat.train.run.adapter_files import trained_on
from loraformat.train.run.options import TrainOptions
from loraformat.train.run.setup import Progress, check_vocabulary, open_model, with_length

__all__ = ["EvaluationReport", "evaluate"]

_OTHER_TOKENS = "has another vocabulary than the one before it: its loss is by its own tokens"


@dataclass(frozen=True, slots=True, repr=False)
class EvaluationReport(Report):
    """Losses on the same tokens.

    Attributes
    ----------
    base : str
    losses : dict of str to HeldOutLoss
        Of the base under its own name, then of each adapter.
    data : list of str
        What is in the data, in sentences.
    """

    base: str
    losses: dict[str, HeldOutLoss] = field(default_factory=dict)
    data: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return it for ``json.dumps``."""
        return {
            "base": self.base,
            "results": [
                {"adapter": None if name == self.base else name, "loss": found.loss,
                 "perplexity": found.perplexity, "tokens": found.tokens}
                for name, found in self.losses.items()
            ],
            "data": self.data,
            "notes": self.notes,
        }  # fmt: skip


def evaluate(
    options: TrainOptions,
    adapters: Sequence[str] = (),
    *,
    tell: Callable[[str, int, int], None] = lambda name, done, total: None,
    progress: Progress = lambda done, total: None,
) -> EvaluationReport:
    """Measure losses; `loraformat.evaluate` is the public function.

    `adapters` are paths or Hub ids. `tell` is called with what is measured, the batches done and in
    total; `progress` with the rows looked at and in total.
    """
    found = EvaluationReport(options.base)
    data: Dataset | None = None
    tokenizer = None
    for adapter in (None, *adapters):
        with open_model(replace(options, adapter=adapter or ""), to_train=False) as model:
            if data is None or model.tokenizer_directory != tokenizer:
                if data is not None:
                    found.notes.append(f"{adapter or options.base}: {_OTHER_TOKENS}")
                options = with_length(model, options)
                tokenizer = model.tokenizer_directory
                encoder = open_tokenizer(tokenizer, options.chat_template or None)
                check_vocabulary(model, encoder)
                settings = options.data_options(shuffle=False)
                data = open_data(options.data, encoder.tokenizer, settings, progress=progress)
                found.data[:] = data.audit.lines()
            found.notes.extend(model.notes)
            if adapter:
                found.notes.extend(trained_on(adapter, data.audit.sources))
            name = adapter or options.base
            total = data.batches_in(0)
            batches = _counted(data, partial(tell, name), total)
            found.losses[name] = held_out_loss(model, batches, device=options.device)
    return found


def _counted(data: Dataset, tell: Callable[[int, int], None], total: int) -> Iterator[Batch]:
    for number, (batch, _) in enumerate(data.batches(epochs=1)):
        yield batch
        tell(number + 1, total)
