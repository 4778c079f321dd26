"""Tokenizer files of a model, and special tokens in its configs.

A tokenizer may come without ``tokenizer.json``, as ``vocab.json`` with ``merges.txt`` or as
``vocab.txt``. How those become a tokenizer is known to the class that the model names, so
transformers makes ``tokenizer.json`` of them; in a directory of its own, without any code of the
model's.
"""

from __future__ import annotations

import json
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

from loraformat.errors import InputError, MissingDependencyError, UnsupportedError
from loraformat.model import config_json
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.tokenizer_files import CarriedTokenizer
from loraformat.storage.foreign_json import parse_object

__all__ = ["Sources", "stand_alone", "steps_in"]

_VOCABULARIES = (("vocab.json", "merges.txt"), ("vocab.txt",))
_BESIDE = ("special_tokens_map.json", "added_tokens.json")
_CONFIG = "tokenizer_config.json"
_FILE = "tokenizer.json"
_MOST_BYTES = 64 << 20


class Sources(CarriedTokenizer):
    """What a checkpoint carries of its tokenizer."""

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
        return _made_by_transformers(self, self.model_config.get("model_type"))

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


def steps_in(definition: Any, inner: str) -> list[Any]:
    """Return the steps of a part of ``tokenizer.json``, those of a Sequence from its ``inner``.

    None stands for what should be a list of steps and is none.
    """
    if not isinstance(definition, dict) or definition.get("type") != "Sequence":
        return [] if definition is None else [definition]
    if not isinstance(steps := definition.get(inner), list):
        return [None]
    return [step for one in steps for step in steps_in(one, inner)]


def stand_alone(files: CarriedTokenizer) -> bool:
    """Tell whether there is a vocabulary of which transformers can make a tokenizer."""
    return any(all(map(files.has, names)) for names in _VOCABULARIES)


def _made_by_transformers(files: CarriedTokenizer, model_type: str | None) -> dict[str, Any]:
    """Return the ``tokenizer.json`` that transformers makes of a vocabulary.

    The model's type names the class where ``tokenizer_config.json`` does not.

    Raises
    ------
    InputError
        If it cannot.
    MissingDependencyError
        If transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingDependencyError(
            "a tokenizer without tokenizer.json needs transformers, which is not installed",
            hint="run: pip install 'loraformat[train]'",
        ) from None
    names = [name for name in (*sum(_VOCABULARIES, ()), *_BESIDE) if files.has(name)]
    if sum(map(files.size, names)) > _MOST_BYTES:
        raise files.wrong(names[0], f"and its kin have more than {_MOST_BYTES} bytes")
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        for name in names:
            (here / name).write_bytes(files.bytes(name))
        config = {key: value for key, value in files.config.items() if key != "auto_map"}
        (here / _CONFIG).write_text(json.dumps(config), encoding="utf-8")
        (here / "config.json").write_text(
            json.dumps({"model_type": model_type} if model_type else {})
        )
        try:
            made = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            text = made.backend_tokenizer.to_str()
        except Exception as error:  # whatever a damaged file makes of transformers' code
            raise _not_made(files, names, error) from None
        return parse_object(text.encode(), files.path)


def _not_made(files: CarriedTokenizer, names: list[str], error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(
        f"transformers makes no tokenizer of {', '.join(names)}: {reason}",
        path=files.path,
        hint=f"save one: AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIR) writes {_FILE}",
    )
