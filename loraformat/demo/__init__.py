"""The small real model that ships with loraformat, its held-out text, and what is shown on them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["HELDOUT", "SMALL_MODEL"]

#: Directory of the model: a Hugging Face checkpoint in bfloat16 with its tokenizer.
SMALL_MODEL = Path(__file__).parent / "small_model"

#: Text that the model has not seen, for perplexity; UTF-8.
HELDOUT = Path(__file__).parent / "heldout.txt"
