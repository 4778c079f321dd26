"""mlx-lm: ``mlx_lm/tuner/utils.py``. Its adapters have a format of their own."""

from __future__ import annotations

from loraformat.runtimes.known.advice import INIT
from loraformat.runtimes.record import Runtime, caution, differs, refuses
from loraformat.runtimes.scaling import as_trained

__all__ = ["MLX"]

_MERGED = "a merged model has the tokenizer files of the base"
_COPY = "copy the adapter's over those of the merged model"

MLX = Runtime(
    name="mlx",
    title="mlx-lm",
    version="d78bf58 of 2026-08-22, from its source",
    format="",
    format_remedy="merge",
    format_why="mlx-lm reads adapters.safetensors of its own, or any merged model",
    scaling=as_trained,
    treats={
        "INIT_MUTATES_BASE": differs("the factors belong to a modified base", "advice", INIT),
        "ALORA": refuses("it acts on some tokens only and cannot be merged", "advice"),
        "TOKENIZER_CHANGED": caution(_MERGED, "advice", _COPY),
        "CHAT_TEMPLATE_CHANGED": caution(
            _MERGED,
            "advice",
            "copy the adapter's chat_template.jinja to the merged model",
        ),
    },
)
