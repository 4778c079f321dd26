"""Expected tensor shapes from hyperparameters, by GGUF name.

A file whose metadata do not fit its tensors would be refused by llama.cpp when it is loaded,
and by transformers filled with random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

from loraformat.errors import InputError, printable
from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.record import Architecture
from loraformat_converters.gguf.architectures.weights import Sizes, sizes

__all__ = ["check_dimensions"]


def check_dimensions(
    architecture: Architecture, config: Config, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare the tensors of a GGUF file with the model's hyperparameters.

    Parameters
    ----------
    architecture : Architecture
    config : Config
    shapes : mapping of str to tuple of int
        By GGUF name, as numpy counts; what is not known is not checked.

    Raises
    ------
    InputError
        Which tensor has another shape, and which was wanted.
    """
    promised = _promised(architecture, config)
    for name, shape in shapes.items():
        kind, _, suffix = name.rpartition(".")
        module = kind.rpartition(".")[2]
        if module.isdecimal():  # blk.0.ffn_up.3.weight: one expert of an old file
            stacked = promised.get(f"{kind.split('.')[-2]}_exps")
            wanted = None if stacked is None else stacked[1:]
        else:
            wanted = promised.get(module)
        if wanted is None:
            continue
        if suffix == "bias":
            wanted = wanted[:1]
        if len(shape) != len(wanted) or any(
            size not in (None, found) for size, found in zip(wanted, shape, strict=True)
        ):
            said = ["any" if size is None else size for size in wanted]
            raise InputError(
                f"tensor {printable(name)} has shape {list(shape)}, and the hyperparameters say "
                f"[{', '.join(map(str, said))}]"
            )


def _promised(architecture: Architecture, config: Config) -> dict[str, Sizes]:
    """Return the shape of each weight, by the last part of its module's name."""
    rows = [row for row in architecture.rows(config) if row.gguf.endswith(".weight")]
    rows += [architecture.head] if architecture.head else []
    shapes = {"attn_qkv": "qkv hidden"}  # some files have three projections in one tensor
    shapes |= {row.gguf.split(".")[-2]: row.shape for row in rows}
    return {module: sizes(shape, config) for module, shape in shapes.items()}
