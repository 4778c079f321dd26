"""The demo, with the small model and the adapters that ship with loraformat."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ADAPTERS", "HELDOUT", "SMALL_ADAPTERS", "SMALL_MODEL"]

_HERE = Path(__file__).parent

#: Directory of the model: a Hugging Face checkpoint in bfloat16 with its tokenizer.
SMALL_MODEL = _HERE / "small_model"

#: Directory of the model's adapters, as PEFT saves them, with their training record.
SMALL_ADAPTERS = _HERE / "small_adapters"

#: The adapters by name: each was trained on another kind of text.
ADAPTERS = {name: SMALL_ADAPTERS / name for name in ("manual", "tests")}

#: Text that the model has not seen, for perplexity; UTF-8.
HELDOUT = _HERE / "heldout.txt"
