"""What `loraformat info` reports of a model and of an adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from loraformat.model.quantization_history import Quantized
from loraformat.model.report import Report

__all__ = [
    "AdapterInfo",
    "AdapterSummary",
    "InfoReport",
    "ModelInfo",
    "ModuleSummary",
    "TensorSummary",
]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class InfoReport(Report):
    """Description of a model or an adapter.

    Attributes
    ----------
    path, format : str
    kind : str
        ``"base"`` or ``"adapter"``.
    parameters : int
        Elements of all tensors.
    dtypes : dict of str to int
        Parameters by encoding and dtype.
    """

    _shared: ClassVar[tuple[str, ...]] = ("notes",)
    #: The member that lists every tensor or module; it may be long.
    _listing: ClassVar[str]

    path: str
    format: str
    parameters: int
    dtypes: dict[str, int]
    kind: str

    def to_dict(self, *, tensors: bool = True) -> dict[str, Any]:
        """Return the members that ``--json`` prints, with or without the list of tensors."""
        members = Report.to_dict(self)
        if not tensors:
            del members[self._listing]
        return members


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """One logical tensor.

    ``bytes`` is what its codes and scales, or its numbers, take on disk; ``encoding`` is ``nf4``,
    ``dense``, or the name of a GGUF block type in small letters, which becomes ``dtype``.
    """

    name: str
    encoding: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    relative_rms_error: float | None = None


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """One adapter of a bundle, from its headers and config alone."""

    name: str
    parameters: int
    bytes: int
    ranks: list[int]
    targets: list[str]
    base: str | None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ModelInfo(InfoReport):
    """Description of a model.

    Attributes
    ----------
    architecture, model_type : str or None
        From ``config.json``.
    layers : int
    quantized_parameters : int
        Elements in NF4.
    weight_bytes, total_bytes : int
        Codes, scales and numbers; all files.
    bits_per_weight : float
        8 · weight_bytes / parameters.
    quantized_bits_per_weight : float or None
        The same over the NF4 weights alone.
    block_sizes : list of int
    double_quant : bool
    fingerprint, created_by : str or None
        Of a bundle.
    source : dict of str to str
    quantized_before : list of Quantized
        How the weights were quantized before they got their present form, as far as it is known.
    adapters : list of AdapterSummary
    tensors : list of TensorSummary
    """

    _shared: ClassVar[tuple[str, ...]] = ()
    _listing: ClassVar[str] = "tensors"

    architecture: str | None
    model_type: str | None
    layers: int
    quantized_parameters: int
    weight_bytes: int
    total_bytes: int
    bits_per_weight: float
    quantized_bits_per_weight: float | None
    block_sizes: list[int]
    double_quant: bool
    fingerprint: str | None = None
    created_by: str | None = None
    source: dict[str, str] = field(default_factory=dict)
    quantized_before: list[Quantized] = field(default_factory=list)
    adapters: list[AdapterSummary] = field(default_factory=list)
    tensors: list[TensorSummary] = field(default_factory=list)
    kind: str = "base"


@dataclass(frozen=True, slots=True)
class ModuleSummary:
    """One weight that an adapter changes: W + scaling · B A."""

    target: str
    rank: int
    alpha: float
    scaling: float
    out_features: int
    in_features: int
    dtype: str
    parameters: int
    dora: bool
    bias: bool


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class AdapterInfo(InfoReport):
    """Description of an adapter.

    Attributes
    ----------
    ranks : list of int
        Every rank that occurs, from the shapes of the factors.
    alphas, scalings : list of float
        Every α, and every factor of B A, that occurs.
    targets : list of str
        Last names of the modules.
    bytes : int
        Size of all files.
    base_model, base_fingerprint : str or None
        What it says of its base.
    bundle : str or None
        The bundle whose manifest lists it.
    dora, biases, embeddings : int
        How many modules have a magnitude, a bias, or are embeddings.
    replacements : list of str
        Weights that it replaces as a whole.
    replaced_rows : list of str
        Weights of which it replaces rows.
    modules : list of ModuleSummary
    """

    _listing: ClassVar[str] = "modules"

    ranks: list[int]
    alphas: list[float]
    scalings: list[float]
    targets: list[str]
    bytes: int
    base_model: str | None
    base_fingerprint: str | None
    bundle: str | None
    dora: int
    biases: int
    embeddings: int
    replacements: list[str]
    replaced_rows: list[str]
    modules: list[ModuleSummary] = field(default_factory=list)
    kind: str = "adapter"
