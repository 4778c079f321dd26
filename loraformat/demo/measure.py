"""Perplexity of the demo's models, each loaded by the library that users load it with.

Models by transformers, NF4 weights by bitsandbytes, adapters by PEFT. What is not installed is
not measured, and said once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loraformat.demo.perplexity import Perplexity, load, perplexity_of
from loraformat.demo.texts import heldout
from loraformat.model.description import ModelInfo
from loraformat.ops.info.model import info

__all__ = ["Measure", "Measured", "summary_of"]

#: Perplexity by kind of text.
Measured = dict[str, Perplexity]


def summary_of(model: Path) -> ModelInfo:
    """Describe a model of the demo."""
    summary = info(model)
    assert isinstance(summary, ModelInfo)
    return summary


class Measure:
    """Perplexity of the models that installed packages can open; `notes` says what they cannot."""

    def __init__(self, notes: list[str]) -> None:
        self.dense = find_spec("transformers") is not None
        self.nf4 = self.dense and all(map(find_spec, ("bitsandbytes", "accelerate")))
        self.adapters = self.nf4 and find_spec("peft") is not None
        self._open: tuple[Path, Any, Any] | None = None
        if not self.adapters:
            notes.append(
                "some measurements were skipped; run: pip install 'loraformat[demo]', which "
                "brings transformers, bitsandbytes, accelerate and peft"
            )

    def model(self, path: Path, kinds: Iterable[str]) -> Measured:
        """Measure a model; empty if the package that opens it is missing."""
        quantized = summary_of(path).quantized_parameters > 0
        if not (self.nf4 if quantized else self.dense):
            return {}
        return self._texts(*self._loaded(path), kinds)

    def with_adapters(self, base: Path, wanted: Sequence[tuple[Path, Iterable[str]]]) -> list[Any]:
        """Measure a base with each adapter in turn, on its kinds of text, as PEFT applies it."""
        if not self.adapters:
            return [{} for _ in wanted]
        from peft import PeftModel

        model, tokenizer = self._loaded(base)
        self._open = None  # PEFT changes the model in place
        found = []
        for number, (adapter, kinds) in enumerate(wanted):
            name = f"adapter{number}"
            if isinstance(model, PeftModel):
                model.load_adapter(adapter, name)
                model.set_adapter(name)
            else:
                model = PeftModel.from_pretrained(model, adapter, adapter_name=name)
            found.append(self._texts(model, tokenizer, kinds))
        return found

    def _loaded(self, path: Path) -> tuple[Any, Any]:
        if self._open is None or self._open[0] != path:
            self._open = (path, *load(path))
        return self._open[1:]

    @staticmethod
    def _texts(model: Any, tokenizer: Any, kinds: Iterable[str]) -> Measured:
        return {kind: perplexity_of(model, tokenizer, heldout(kind)) for kind in kinds}
