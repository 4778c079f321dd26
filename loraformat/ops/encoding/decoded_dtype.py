"""The dtype of weights dequantized from block types."""

from __future__ import annotations

from dataclasses import replace

from loraformat.model.checkpoint import Checkpoint
from loraformat.model.config_json import with_dtype
from loraformat.plugins import BaseFormat
from loraformat.tensors.dtypes import TORCH_NAMES

__all__ = ["with_decoded_dtype"]

#: A block's scale, a float16, times a code, plus a minimum: of the plain types only this one
#: holds every such number exactly.
_EXACT = "F32"


def with_decoded_dtype(
    checkpoint: Checkpoint, writer: BaseFormat, dtype: str | None
) -> tuple[Checkpoint, list[str]]:
    """Set the dtype in ``config.json`` to the one in which decoded numbers are exact.

    Without that, transformers would round them as it opens them.

    Parameters
    ----------
    checkpoint : Checkpoint
    writer : BaseFormat
    dtype : str or None
        What the user asked for.

    Returns
    -------
    checkpoint : Checkpoint
    notes : list of str
        What a user should know.
    """
    if dtype is not None or writer.dtypes or writer.stores != "dense":
        return checkpoint, []
    decoded = [tensor for tensor in checkpoint.dense_tensors if tensor.quantization]
    if not decoded or any(tensor.dtype != _EXACT for tensor in decoded):
        return checkpoint, []
    config = checkpoint.config
    if config is not None:
        checkpoint = replace(checkpoint, config=with_dtype(config, TORCH_NAMES[_EXACT]))
    return checkpoint, [
        f"{len(decoded)} weights in block types were dequantized to f32, which is exact; half the "
        "size: --dtype f16 (error 0.02%) and --dtype bf16 (0.17%)"
    ]
