"""Trained embedding rows (``trainable_token_indices``).

PEFT calls the tensor ``trainable_tokens_delta``, but its rows are the new values themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraformat.errors import InputError, printable
from loraformat.model.adapter import RowReplacement
from loraformat.model.checkpoint import DenseTensor

__all__ = ["FIELD", "read_rows", "rows_config"]

FIELD = "trainable_token_indices"


def read_rows(
    tensors: Mapping[str, DenseTensor],
    config: Mapping[str, Any],
    path: Path,
    in_base: Callable[[str], str],
) -> dict[str, RowReplacement]:
    """Combine the rows stored for each module with the indices in the config; they must fit.

    ``in_base`` gives the base's name of a tensor.
    """
    named = config.get(FIELD)
    if named and not tensors:
        raise InputError(f"{FIELD} names tokens, and no tensor holds their rows", path=path)
    found = {}
    for module, tensor in tensors.items():
        if _is_of_a_tied_head(module, tensors, named):
            continue
        indices = _indices(module, named, path)
        if len(tensor.shape) != 2 or tensor.shape[0] != len(indices):
            raise InputError(
                f"module {printable(module)}: rows of shape {list(tensor.shape)} for "
                f"{len(indices)} tokens",
                path=path,
            )
        target = in_base(module + ".weight")
        found[target] = RowReplacement(target, indices, replace(tensor, name=target))
    return found


def _is_of_a_tied_head(module: str, tensors: Mapping[str, DenseTensor], named: Any) -> bool:
    """Tell whether rows of a tied head repeat those of the embedding.

    PEFT saves them so where it saves whole embeddings and the head is tied; its config names those
    of the embedding alone.
    """
    if not isinstance(named, dict) or not module.endswith("lm_head"):
        return False
    others = [other for other in tensors if other.endswith(tuple(named))]
    shape = tensors[module].shape
    return module not in others and any(tensors[other].shape == shape for other in others)


def _indices(module: str, named: Any, path: Path) -> tuple[int, ...]:
    if isinstance(named, dict):
        # As PEFT looks: by the end of the module's name.
        named = next((value for key, value in named.items() if module.endswith(key)), None)
    whole = isinstance(named, list) and all(
        type(index) is int and 0 <= index < 1 << 31 for index in named
    )
    if not whole or len(set(named)) != len(named):
        raise InputError(
            f"{FIELD} gives no tokens for {printable(module)}, or one twice, or no whole number",
            path=path,
        )
    return tuple(named)


def rows_config(rows: Mapping[str, RowReplacement], given: Any) -> Any:
    """Return ``trainable_token_indices`` for the config, unchanged if still right."""
    own = {target.removesuffix(".weight"): list(row.indices) for target, row in rows.items()}
    if isinstance(given, list) and list(own.values()) == [given]:
        return given
    if isinstance(given, dict) and all(
        any(module.endswith(key) and indices == value for key, value in given.items())
        for module, indices in own.items()
    ):
        return given or None
    return own or None
