"""Tensor names: layer numbers, names without them, natural order."""

from __future__ import annotations

import re

__all__ = ["layer_of", "natural", "spelled_in_2019", "type_of"]

_DIGITS = re.compile(r"(\d+)")


def layer_of(name: str) -> tuple[str, int] | None:
    """Return the layer a tensor belongs to: the name up to its first number, and the number.

    Examples
    --------
    >>> layer_of("model.layers.12.mlp.experts.3.w1.weight")
    ('model.layers', 12)
    >>> layer_of("model.norm.weight") is None
    True
    """
    parts = name.split(".")
    for index, part in enumerate(parts):
        # At most 9 digits: the number of a layer, not an attack on int().
        if index and part.isascii() and part.isdigit() and len(part) < 10:
            return ".".join(parts[:index]), int(part)
    return None


def type_of(name: str) -> str:
    """Return a tensor's name with a star for the number of its layer.

    Examples
    --------
    >>> type_of("model.layers.12.mlp.up_proj.weight"), type_of("model.norm.weight")
    ('model.layers.*.mlp.up_proj.weight', 'model.norm.weight')
    """
    layer = layer_of(name)
    if layer is None:
        return name
    rest = name[len(layer[0]) + 1 :].partition(".")[2]
    return f"{layer[0]}.*.{rest}"


def spelled_in_2019(name: str) -> str:
    """Return the legacy BERT name of a norm tensor (``gamma``, ``beta``).

    Examples
    --------
    >>> spelled_in_2019("bert.embeddings.LayerNorm.weight")
    'bert.embeddings.LayerNorm.gamma'
    """
    name = re.sub(r"(?<=\.LayerNorm\.)weight$", "gamma", name)
    return re.sub(r"(?<=\.LayerNorm\.)bias$", "beta", name)


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts expert 2 before expert 10."""
    return tuple(
        (1, int(piece), "") if piece.isdecimal() else (0, 0, piece) for piece in _DIGITS.split(name)
    )
