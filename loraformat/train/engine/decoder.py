"""The decoder layers and the output head of a transformers model, and how it computes its logits.

Between its last hidden states and its logits a class may scale (Cohere, Granite) or cap (Gemma 2:
c · tanh(z / c)). Its source is not read; its ``forward`` is run with a decoder and a head that
return known numbers, and what comes out must be what a rule says. A class for which none does keeps
its own ``forward``, on a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from loraformat.errors import UnsupportedError, printable
from loraformat.train.engine.experts import ExpertStack
from loraformat.train.engine.linear import FrozenLinear
from loraformat.train.engine.meta_model import text_config

__all__ = [
    "HeadRule",
    "decoder_of",
    "find_head_rule",
    "find_layers",
    "head_name",
    "number_layers",
    "own_logits",
]


def decoder_of(model: Any) -> Any:
    """Return the part of a causal language model that turns tokens into hidden states."""
    found = model.get_decoder()
    if found is not model and found is not model.get_output_embeddings():
        return found  # ModernBERT calls its head the decoder
    from transformers import PreTrainedModel

    return next((m for m in model.children() if isinstance(m, PreTrainedModel)), model)


def find_layers(model: Any, path: object) -> tuple[str, list[torch.nn.Module]]:
    """Return the name of the list of decoder layers, and the layers.

    Raises
    ------
    UnsupportedError
        If the decoder has no list of as many modules as its config says it has layers.
    """
    decoder, count = decoder_of(model), text_config(model.config).num_hidden_layers
    lists = [
        (name, list(module))
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise UnsupportedError(
            f"{printable(type(model).__name__)} has no list of its {count} decoder layers",
            path=f"{path}",
        )
    name, layers = min(lists, key=lambda found: found[0].count("."))
    prefix = next((n for n, module in model.named_modules() if module is decoder), "")
    return ".".join(part for part in (prefix, name) if part), layers


def number_layers(model: Any, path: object) -> None:
    """Tell each linear and each stack of experts of the decoder which layer it stands in."""
    for number, layer in enumerate(find_layers(model, path)[1]):
        for module in layer.modules():
            if isinstance(module, FrozenLinear | ExpertStack):
                module.layer = number


def head_name(model: Any, path: object) -> str:
    """Return the name of the output head.

    Raises
    ------
    UnsupportedError
        If the model has none.
    """
    head = model.get_output_embeddings()
    names: list[str] = [name for name, module in model.named_modules() if module is head]
    if head is not None and names:
        return names[0]
    raise UnsupportedError(
        f"{printable(type(model).__name__)} has no output head to train with", path=f"{path}"
    )


@dataclass(frozen=True, slots=True)
class HeadRule:
    """logits = cap(scale · (W · before · h + b)), with cap(z) = c · tanh(z / c).

    Attributes
    ----------
    before, scale : float
    cap : float or None
    """

    before: float = 1.0
    scale: float = 1.0
    cap: float | None = None

    def apply_(self, z: torch.Tensor) -> torch.Tensor:
        """Turn what the head returns into logits, in place.

        Examples
        --------
        >>> HeadRule(scale=0.5).apply_(torch.tensor([4.0]))
        tensor([2.])
        """
        if self.cap is None:
            return z if self.scale == 1 else z.mul_(self.scale)
        return z.mul_(self.scale / self.cap).tanh_().mul_(self.cap)


class _Output:
    """Stands in for any of transformers' output classes: hidden states, and None for the rest."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Returning:
    """Stands in for a module's ``forward``: returns a value, and remembers what it was given."""

    def __init__(self, value: Any) -> None:
        self.value, self.seen = value, None

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        self.seen = arguments[0] if arguments else None
        return self.value


@contextmanager
def _standing_in(module: Any, value: Any) -> Iterator[_Returning]:
    """Let a module return a value while it lasts."""
    module.forward = stand_in = _Returning(value)
    try:
        yield stand_in
    finally:
        del module.forward


def own_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits that a model's own class makes of hidden states.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    hidden : torch.Tensor
        (tokens, hidden size), after the last norm.

    Returns
    -------
    torch.Tensor
        (tokens, vocabulary).
    """
    tokens = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    with _standing_in(decoder_of(model), _Output(hidden[None])):
        output = model.forward(input_ids=tokens, use_cache=False, return_dict=True)
    logits: torch.Tensor = output.logits
    return logits.reshape(len(hidden), -1)


def find_head_rule(model: Any, head: FrozenLinear, cap: float | None) -> HeadRule | None:
    """Find the rule of a class by asking it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    head : FrozenLinear
        The output head in it.
    cap : float or None
        What the config says of capping.

    Returns
    -------
    HeadRule or None
        None if no rule gives what the class gives.
    """
    z = torch.cat([torch.tensor([1.0, 1e-3]), torch.linspace(-90.0, 90.0, 62)]).repeat(2, 1)
    hidden = torch.linspace(-2.0, 2.0, 2 * head.in_features).view(2, -1) + 0.01
    try:
        with torch.no_grad(), _standing_in(head, z.clone()[None]) as stand_in:
            found = own_logits(model, hidden.clone())
            seen = stand_in.seen
    except Exception:  # a class of anybody's, with more than a rule before its head
        return None
    if seen is None or found.shape != z.shape or seen.numel() != hidden.numel():
        return None
    before = float(seen.reshape(-1)[0] / hidden.reshape(-1)[0])
    small = float(found[0, 1] / z[0, 1])
    rule = HeadRule(before, small if cap is not None else float(found[0, 0]), cap)
    same = torch.allclose(seen.view_as(hidden), hidden * before, rtol=1e-5, atol=0)
    fits = torch.allclose(found, rule.apply_(z.clone()), rtol=1e-5, atol=1e-6)
    return rule if same and fits else None
