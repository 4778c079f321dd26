"""Tokenizer files of a model, and special tokens in its configs."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from loraformat.errors import UnsupportedError
from loraformat.model import config_json
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.tokenizer_files import CarriedTokenizer
from loraformat_converters.gguf.tokenizers.vocabulary_files import (
    made_by_transformers,
    stand_alone,
)

__all__ = ["Sources"]


class Sources(CarriedTokenizer):
    """What a checkpoint carries of its tokenizer.

    Parameters
    ----------
    checkpoint : Checkpoint
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.files, checkpoint.path)
        self.checkpoint = checkpoint

    def refused(self, what: str, hint: str | None = None) -> UnsupportedError:
        """Return an error about a tokenizer that llama.cpp has no equal of."""
        return UnsupportedError(what, path=self.checkpoint.path, hint=hint)

    @cached_property
    def model_config(self) -> dict[str, Any]:
        """``config.json`` of the model."""
        if self.checkpoint.config is None:
            return {}
        return config_json.parse(self.checkpoint.config)

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """``tokenizer.json``, or what transformers makes of a vocabulary without one."""
        if self.has("tokenizer.json") or not stand_alone(self):
            return self.json("tokenizer.json")
        return made_by_transformers(self, self.model_config.get("model_type"))

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The numbers of special tokens that the model's configs give, the first of several."""
        found = {}
        for values in (self.model_config, self.json("generation_config.json")):
            for kind in ("bos", "eos", "pad"):
                number = values.get(f"{kind}_token_id")
                if isinstance(number, list) and number:
                    number = number[0]
                if type(number) is int:
                    found[kind] = number
        return found
