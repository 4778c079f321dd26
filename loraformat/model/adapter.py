"""The format-independent adapter: low-rank deltas and replacements.

An `Adapter` says what it does to a base, whatever format it came from: for each weight
that it changes a `LoraDelta`, with its scaling already resolved (rank from the shapes,
alpha, rsLoRA, patterns); for each weight that it replaces a tensor. Factors are lazy,
like the tensors of a `loraformat.model.checkpoint.Checkpoint`. Names are those of the base's
tensors; orientation is PEFT's: A is (rank, in), B is (out, rank).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loraformat.model.checkpoint import CarriedFile, DenseTensor

__all__ = [
    "LARGEST_SCALING",
    "STATISTICS_NAME",
    "Adapter",
    "LoraDelta",
    "RowReplacement",
    "is_adapter_file",
]

#: File with the second moments of activations, beside an adapter's weights.
STATISTICS_NAME = "activation_statistics.safetensors"
#: float32's largest number: every runtime scales in float32 or less.
LARGEST_SCALING = (2 - 2**-23) * 2.0**127


def is_adapter_file(name: str) -> bool:
    """Tell whether a file name belongs to an adapter rather than a base.

    Examples
    --------
    >>> is_adapter_file("adapter_model.safetensors"), is_adapter_file("model.safetensors")
    (True, False)
    """
    return name.startswith("adapter_") or name == STATISTICS_NAME


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """A low-rank change of one base tensor: D = scaling · B A (Hu 2021, section 4.1).

    Attributes
    ----------
    target : str
        Name of the base tensor, ``model.layers.0.self_attn.q_proj.weight`` for example.
    a : DenseTensor
        Shape (rank, in); for experts (experts, rank, in).
    b : DenseTensor
        Shape (out, rank); for experts (experts, out, rank).
    scaling : float
        Resolved: α/r, or α/√r with rsLoRA (Kalajdzievski 2023), per module.
    orientation : {"linear", "transposed"}
        ``"linear"``: D is added to the tensor. ``"transposed"``: its transpose is, because
        the base holds the weight as (in, out): Conv1D and embeddings.
    magnitude : DenseTensor or None
        DoRA (Liu 2024): per output feature m; W' = m · (W + D) / ‖W + D‖ by rows.
    bias : DenseTensor or None
        ``lora_bias``: scaling · bias is added to the module's bias.
    second_moment : DenseTensor or None
        E[z zᵀ] of z = A x, (rank, rank) float32, if the trainer recorded it.
    alpha : float
        As in the source's config, for messages; `scaling` is the truth.
    """

    target: str
    a: DenseTensor
    b: DenseTensor
    scaling: float
    orientation: Literal["linear", "transposed"] = "linear"
    magnitude: DenseTensor | None = None
    bias: DenseTensor | None = None
    second_moment: DenseTensor | None = None
    alpha: float = 0.0

    @property
    def rank(self) -> int:
        """Inner dimension of the product."""
        return self.a.shape[-2]

    @property
    def in_features(self) -> int:
        """Columns of D."""
        return self.a.shape[-1]

    @property
    def out_features(self) -> int:
        """Rows of D."""
        return self.b.shape[-2]

    @property
    def parameters(self) -> int:
        """Elements of A and B."""
        return self.a.count + self.b.count


@dataclass(frozen=True, slots=True)
class RowReplacement:
    """New values for some rows of a base tensor (trainable tokens).

    Attributes
    ----------
    target : str
    indices : tuple of int
    rows : DenseTensor
        Shape (len(indices), columns).
    """

    target: str
    indices: tuple[int, ...]
    rows: DenseTensor


@dataclass(slots=True)
class Adapter:
    """An adapter: its effect on a base, independent of the file format.

    Attributes
    ----------
    path : Path
    format : str
        Name of the converter that read it.
    deltas : dict of str to LoraDelta
        By target.
    replacements : dict of str to DenseTensor
        Base tensors that are replaced in full (modules_to_save, trained biases), by name.
    rows : dict of str to RowReplacement
        By target.
    invocation_tokens : tuple of int
        The deltas act only from where these tokens occur (aLoRA, Greenewald 2025); empty if
        they act always. Such an adapter cannot be merged.
    spellings : dict of str to str
        What the source calls a tensor, by its name above, where those differ: deltas that were
        held against a base have its names, and are written again under their own.
    config : dict
        The source's own config, for what has no place above (task type, names, dropout).
    base_model : str or None
        What the adapter calls its base: a Hub id or a path.
    base_fingerprint : str or None
        Fingerprint of the base it was made for, if it carries one.
    base_source : str or None
        The ``source`` of that base as JSON text, if it carries one.
    files : tuple of CarriedFile
        Everything in its directory, byte for byte, weights and config included: what a
        verbatim copy needs.
    verbatim : bool
        A copy of `files` is this adapter: it was read from files that every reader of its
        format opens (no pickle), and nothing about it has been changed since.
    sources : tuple of Path
        Every file that is read.
    notes : tuple of str
        What a user should know.
    close : callable
    """

    path: Path
    format: str
    deltas: dict[str, LoraDelta]
    replacements: dict[str, DenseTensor] = field(default_factory=dict)
    rows: dict[str, RowReplacement] = field(default_factory=dict)
    invocation_tokens: tuple[int, ...] = ()
    spellings: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    base_fingerprint: str | None = None
    base_source: str | None = None
    files: tuple[CarriedFile, ...] = ()
    verbatim: bool = False
    sources: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    close: Callable[[], None] = lambda: None

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
