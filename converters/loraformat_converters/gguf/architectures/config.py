"""Typed access to ``config.json``.

A member that is absent has the default of the model's configuration class in transformers,
because that is what transformers computes with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.model.config_json import CONFIG_NAME
from loraformat.storage.foreign_json import is_finite

__all__ = ["LARGEST", "MAX_EXPERTS", "MAX_LAYERS", "Config"]

#: llama.cpp's own limits.
MAX_LAYERS = 512
MAX_EXPERTS = 512
#: What a UINT32 that llama.cpp keeps as int may be.
LARGEST = 2**31 - 1


class Config:
    """A model's hyperparameters.

    Parameters
    ----------
    values : mapping
        ``config.json``; of a model with more than text, its ``text_config``.
    defaults : mapping
        Of the model's class.
    names : mapping of str to str
        The members that the model's class calls otherwise than nearly all others do.
    headless : bool
        The model has no output head. llama.cpp takes its embedding for one, as if it were tied.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any],
        names: Mapping[str, str] | None = None,
        *,
        headless: bool = False,
    ) -> None:
        self.headless = headless
        self.names = names or {}
        self.values = {**defaults, **{k: v for k, v in values.items() if v is not None}}

    def get(self, key: str) -> Any:
        """Return a member as it is, None if there is none."""
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None, most: int = LARGEST) -> int:
        """Return a positive whole number.

        Raises
        ------
        InputError
            If it is missing, or no positive whole number up to ``most``.
        """
        name = self.names.get(key, key)
        value = self.values.get(name, default)
        if value is None:
            value = self._derived(key)
        if type(value) is not int or not 0 < value <= most:
            raise _wrong(name, value, f"a whole number from 1 to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number."""
        value = self.values.get(key, default)
        if not is_finite(value):
            raise _wrong(key, value, "a finite number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a truth value."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise _wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise _wrong(key, value, "a string")
        return value

    def only(self, key: str, *wanted: Any, why: str) -> None:
        """Refuse a member with another value than those that llama.cpp computes with.

        Raises
        ------
        UnsupportedError
            With the reason.
        """
        value = self.values.get(key)
        if value not in wanted:
            raise UnsupportedError(
                f"{CONFIG_NAME} has {key} {printable(value)}: {why}",
                hint="this model cannot run in llama.cpp as it is",
            )

    def _derived(self, key: str) -> int | None:
        """Return what a member that was left out follows from, if it does from others."""
        if key == "num_key_value_heads":
            return self.heads
        if key == "head_dim":
            return self.hidden // self.heads
        if key == "moe_intermediate_size":
            return self.inner
        if self.names.get(key) == "n_inner":
            return 4 * self.hidden
        return None

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.integer("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.integer("num_key_value_heads")

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return self.integer("head_dim")

    @property
    def hidden(self) -> int:
        """Width of the model."""
        return self.integer("hidden_size")

    @property
    def inner(self) -> int:
        """Width of the MLP."""
        return self.integer("intermediate_size")

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.integer("num_hidden_layers", most=MAX_LAYERS)

    @property
    def experts(self) -> int:
        """Experts of a layer, 0 if there are none."""
        for key in ("num_local_experts", "num_experts"):
            if self.values.get(key) is not None:
                return self.integer(key, most=MAX_EXPERTS)
        return 0

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding, or would be if there was one."""
        return self.headless or self.flag("tie_word_embeddings")


def _wrong(key: str, value: object, wanted: str) -> InputError:
    found = "is missing" if value is None else f"is {printable(value)}"
    return InputError(f"{key} {found}, wanted {wanted}", path=CONFIG_NAME)
