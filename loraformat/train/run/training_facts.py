"""What is to be known of a run: stored beside the adapter, for people and model cards.

There is no time of day and no duration in it: two runs of the same work write the same bytes.
"""

from __future__ import annotations

import platform
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loraformat.version import __version__

if TYPE_CHECKING:
    from loraformat.train.data.dataset import Dataset
    from loraformat.train.loop.run_state import RunState
    from loraformat.train.run.options import TrainOptions

__all__ = ["facts_of", "hash_of"]

_READ_AT_ONCE = 1 << 20


def facts_of(
    options: TrainOptions, state: RunState, data: Dataset, held_out: Dataset | None, ranks: int
) -> dict[str, Any]:
    """Return the facts of a run that is done.

    Parameters
    ----------
    options : TrainOptions
    state : RunState
        At its end.
    data, held_out : Dataset
    ranks : int
        Processes that trained.
    """
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
        "versions": _versions(),
    }


def _described(data: Dataset) -> dict[str, Any]:
    audit = data.audit
    return {
        "files": [
            {"name": Path(name).name, "rows": rows, "sha256": hash_of(Path(name))}
            for name, rows in audit.sources
        ],
        "rows": audit.rows,
        "samples": audit.samples,
        "tokens": audit.tokens,
        "trained_tokens": audit.trained,
        "fingerprint": data.fingerprint,
    }


def hash_of(path: Path) -> str | None:
    """Return a file's SHA-256; None for what is no file, a dataset on the Hub for example."""
    if not path.is_file():
        return None
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    try:
        transformers = version("transformers")
    except PackageNotFoundError:
        transformers = "?"
    return {
        "loraformat": __version__,
        "torch": torch.__version__,
        "transformers": transformers,
        "python": platform.python_version(),
    }
