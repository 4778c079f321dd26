"""The choice of an encoding for each tensor of a conversion."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loraformat.errors import UsageError
from loraformat.families.table import family_of, model_type
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor, NF4Tensor
from loraformat.model.config_json import parse, with_dtype
from loraformat.ops.encoding.encode import QuantizationPolicy, cast, dequantized, matches, quantized
from loraformat.ops.encoding.expert_stacks import with_expert_stacks
from loraformat.ops.encoding.nf4_experts import (
    fits_experts4bit,
    in_segments,
    one_run,
    with_scales,
    with_single_experts,
)
from loraformat.plugins import BaseFormat
from loraformat.tensors.dtypes import TORCH_NAMES, parse_weight_dtype

__all__ = ["Encoding"]


@dataclass(frozen=True, slots=True)
class Encoding:
    """Encoding options of the user."""

    dtype: str | None
    block_size: int | None
    double_quant: bool | None
    skip: tuple[str, ...]
    include: tuple[str, ...]
    experts: str | None = None

    def check_experts(self, writer: BaseFormat) -> None:
        """Raise `UsageError` for ``--experts`` if the writer has no such layout."""
        if self.experts is None or self.experts in writer.expert_layouts:
            return
        if writer.expert_layouts:
            known = ", ".join(writer.expert_layouts)
            raise UsageError(f"unknown layout of experts {self.experts!r}, wanted one of {known}")
        raise UsageError(
            f"--experts {self.experts} is for bitsandbytes checkpoints and adapters, and the "
            f"output is a base ({writer.name})",
            hint="omit it, or write such a checkpoint: --to bitsandbytes",
        )

    def apply(self, checkpoint: Checkpoint, writer: BaseFormat) -> Checkpoint:
        """Return the checkpoint in the writer's encoding, lazily."""
        if writer.dtypes:
            return self._for_own_dtypes(checkpoint, writer)
        dtype = parse_weight_dtype(self.dtype) if self.dtype else None
        if writer.stores == "nf4":
            tensors = self._to_nf4(checkpoint, dtype, writer)
        else:
            self._refuse_quantization(writer)
            tensors = [self._to_dense(t, dtype, writer) for t in checkpoint.tensors.values()]
        config = checkpoint.config
        if config is not None and dtype is not None:
            config = with_dtype(config, TORCH_NAMES[dtype])
        named = {tensor.name: tensor for tensor in tensors}
        written = replace(checkpoint, tensors=named, config=config)
        said, wanted = (
            {(one.name, one.segments is None) for one in model.nf4_weights}
            for model in (checkpoint, written)
        )
        if said != wanted:
            written.quantization_config = None  # it does not describe them
        return written

    def stored(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return an encoded checkpoint with codes and scales as tensors where a layout wants so."""
        if self.experts != "experts4bit":
            return checkpoint
        return replace(
            checkpoint, tensors=with_scales(checkpoint.tensors), quantization_config=None
        )

    def _for_own_dtypes(self, checkpoint: Checkpoint, writer: BaseFormat) -> Checkpoint:
        """Leave rounding to the writer; NF4 is decoded to float32."""
        self._refuse_quantization(writer)
        if self.dtype is not None and self.dtype not in writer.dtypes:
            raise UsageError(
                f"{writer.name} has no dtype {self.dtype}, wanted one of {', '.join(writer.dtypes)}"
            )
        tensors = [
            dequantized(tensor, "F32") if isinstance(tensor, NF4Tensor) else tensor
            for tensor in checkpoint.tensors.values()
        ]
        named = {tensor.name: tensor for tensor in tensors}
        return replace(checkpoint, tensors=named, quantization_config=None)

    def _refuse_quantization(self, writer: BaseFormat) -> None:
        if self.block_size or self.double_quant is not None or self.skip or self.include:
            raise UsageError(
                f"{writer.name} stores dense weights; --block-size, --no-double-quant, --skip and "
                "--include apply only to quantized outputs"
            )

    def _to_dense(self, tensor: LazyTensor, dtype: str | None, writer: BaseFormat) -> LazyTensor:
        if isinstance(tensor, NF4Tensor):
            return tensor if writer.stores == "both" else dequantized(tensor, dtype)
        return cast(tensor, dtype)

    def _to_nf4(
        self, checkpoint: Checkpoint, dtype: str | None, writer: BaseFormat
    ) -> list[LazyTensor]:
        already = bool(checkpoint.nf4_weights)
        if already and (self.block_size or self.double_quant is not None or self.skip):
            raise UsageError(
                "the source is already NF4, and weights are never quantized twice; start from the "
                "original to change block size, double quantization or --skip"
            )
        layout = self.experts or "dense"
        settings = parse(checkpoint.config) if checkpoint.config else {}
        policy = QuantizationPolicy(
            self.block_size or 64,
            self.double_quant is not False,
            self.skip,
            self.include,
            stacks=writer.segments or layout != "dense",
            one_run=layout == "fused",
            each_expert=layout == "each",
            plain=family_of(settings).plain,
        )

        def selects(tensor: DenseTensor) -> bool:
            # What a quantized source left plain was left so on purpose.
            wanted = matches(tensor.name, self.include) if already else True
            return wanted and policy.selects(tensor)

        if layout == "each":
            checkpoint = with_single_experts(checkpoint, policy, selects)
        elif policy.stacks:
            checkpoint = with_expert_stacks(checkpoint, selects)
        of_stacks = replace(policy, double_quant=False) if layout == "experts4bit" else policy

        def stays_dense(tensor: DenseTensor) -> bool:
            if len(tensor.shape) != 3 or layout not in ("each", "experts4bit"):
                return not selects(tensor)
            fits = fits_experts4bit(tensor, checkpoint.tensors, policy.block_size)
            return layout == "each" or not fits or not selects(tensor)

        named = model_type(settings)
        tensors: list[LazyTensor] = []
        for tensor in checkpoint.tensors.values():
            tensor = cast(tensor, dtype)
            if isinstance(tensor, DenseTensor):
                how = of_stacks if len(tensor.shape) == 3 else policy
                tensor = tensor if stays_dense(tensor) else quantized(tensor, how, named)
            elif writer.segments or layout == "experts4bit":
                tensor = in_segments(tensor)
            elif tensor.segments is not None:
                tensor = one_run(tensor, policy) if layout == "fused" else dequantized(tensor)
            tensors.append(tensor)
        return tensors
