"""Records of a written model: tensors, shards and other files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["FileRecord", "ShardRecord", "TensorRecord", "WrittenModel", "WrittenShards"]

Encoding = Literal["dense", "nf4"]


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One logical tensor of the base.

    Attributes
    ----------
    encoding : {"dense", "nf4"}
    dtype : str
        safetensors name of the stored type (dense) or of the type that dequantization
        returns (NF4: the dtype of the original).
    shape : tuple of int
        As in the Hugging Face model.
    sha256 : str
        Of the tensor's bytes; for NF4 of its parts, see
        `loraformat.model.nf4_parts.content_digest`.
    block_size : int
        Elements per scale; 0 for a dense tensor.
    double_quant : bool
    transposed : bool
        The NF4 codes run over the transpose (``Conv1D`` weights, as in GPT-2).
    relative_rms_error : float or None
        ‖W − NF4(W)‖ / ‖W‖ if the original was at hand.
    segments : int or None
        Of an NF4 weight that is quantized in segments.
    """

    encoding: Encoding
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    block_size: int = 0
    double_quant: bool = False
    transposed: bool = False
    relative_rms_error: float | None = None
    segments: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object, members in their specified order."""
        fields: dict[str, Any] = {
            "encoding": self.encoding,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }
        if self.encoding == "nf4":
            fields["block_size"] = self.block_size
            fields["double_quant"] = self.double_quant
            fields["transposed"] = self.transposed
            fields["relative_rms_error"] = self.relative_rms_error
            if self.segments is not None:
                fields["segments"] = self.segments
        fields["sha256"] = self.sha256
        return fields


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One shard file: its name, its size in bytes, the SHA-256 of its header (length included)."""

    file: str
    bytes: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A carried file: its size in bytes and its SHA-256."""

    bytes: int
    sha256: str


@dataclass(slots=True)
class WrittenShards:
    """Records of written shards.

    Attributes
    ----------
    shards : list of ShardRecord
    tensors : dict of str to TensorRecord
        In execution order.
    weight_map : dict of str to str
        Shard file by stored tensor.
    total_bytes : int
        Sum of the sizes of all stored tensors.
    """

    shards: list[ShardRecord] = field(default_factory=list)
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    weight_map: dict[str, str] = field(default_factory=dict)
    total_bytes: int = 0


@dataclass(slots=True)
class WrittenModel:
    """Records of a written model.

    Attributes
    ----------
    shards : WrittenShards
    files : dict of str to FileRecord
        All other files.
    notes : list of str
        What a user should know, as sentences.
    """

    shards: WrittenShards
    files: dict[str, FileRecord] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Total size in bytes."""
        return sum(s.bytes for s in self.shards.shards) + sum(f.bytes for f in self.files.values())
