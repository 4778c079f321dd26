"""Errors for adapters that GGUF or llama.cpp cannot represent."""

from __future__ import annotations

import numpy

from loraformat.errors import UnsupportedError, printable
from loraformat.model import config_json
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor
from loraformat.model.tied_head import tied_embedding
from loraformat_converters.gguf.architectures import Architecture, Config

__all__ = [
    "refuse_delta",
    "refuse_embedding",
    "refuse_homeless",
    "refuse_vocabulary",
    "refuse_whole",
]

_MERGE = "merge it: loraformat merge BASE ADAPTER -o merged.gguf"
_MERGE_DENSE = (
    "merge it into safetensors, for transformers or vLLM: loraformat merge BASE ADAPTER -o merged; "
    "or train it again without the head and the embedding"
)


def refuse_whole(
    adapter: Adapter, base: Checkpoint, architecture: Architecture, config: Config
) -> None:
    """Refuse an adapter that is more than low-rank deltas.

    PEFT saves whole embeddings beside their deltas, trained or not: those that are the base's own
    replace nothing.

    Raises
    ------
    UnsupportedError
    """
    remedy = _remedy(adapter, architecture, config)
    if adapter.rows:
        name = next(iter(adapter.rows))
        raise _refused(
            adapter, name, "replaces rows of", "llama.cpp adds low-rank deltas only", remedy
        )
    shared = tied_embedding(base.tensors, config_json.parse(base.config or b"{}"))
    for name, tensor in adapter.replacements.items():
        own = shared if shared and name.endswith("lm_head.weight") else name
        if _is_the_bases_own(tensor, base.tensors.get(own)):
            continue
        if name.endswith(".bias"):
            reason = "a GGUF adapter holds no biases"
        elif "norm" in name.rpartition(".")[0].rpartition(".")[2] or ".ln_" in name:
            reason = "llama.cpp silently skips trained norms"
        else:
            reason = "llama.cpp adds low-rank deltas only"
        if name in adapter.deltas and not base.tensors:
            reason += " (if it is only a copy of the base's, name a base with weights)"
        raise _refused(adapter, name, "replaces", reason, remedy)
    if not adapter.deltas:
        raise UnsupportedError("has no low-rank delta", path=adapter.path)


def refuse_delta(
    delta: LoraDelta, adapter: Adapter, architecture: Architecture, config: Config
) -> None:
    """Refuse a delta with a part that GGUF has no place for.

    Raises
    ------
    UnsupportedError
    """
    if delta.magnitude is not None:
        does, reason = "uses DoRA for", "that is not a low-rank delta"
    elif delta.bias is not None:
        does, reason = "has a bias (lora_bias) for", "a GGUF adapter holds no biases"
    elif len(delta.a.shape) == 3 and delta.orientation != "linear":
        does, reason = "has transposed experts for", "no architecture of GGUF has them"
    else:
        return
    raise _refused(adapter, delta.target, does, reason, _remedy(adapter, architecture, config))


def refuse_homeless(
    delta: LoraDelta, adapter: Adapter, architecture: Architecture, config: Config
) -> UnsupportedError:
    """Return the error for a delta that no GGUF tensor takes."""
    module = delta.target.removesuffix(".weight")
    if architecture.head_is_embedding(config) and module.endswith("lm_head"):
        return _refused(
            adapter, delta.target, "changes",
            "the head is tied to the embedding, so that llama.cpp has no tensor for it",
            _remedy(adapter, architecture, config),
        )  # fmt: skip
    return UnsupportedError(
        f"changes {printable(module)}, which has no delta in llama.cpp's {architecture.name} with "
        f"{config.layers} layers",
        path=adapter.path,
        hint=f"was it made for another base? If not, {_MERGE}",
    )


def refuse_embedding(
    delta: LoraDelta, adapter: Adapter, architecture: Architecture, config: Config
) -> None:
    """Refuse an embedding's delta where the head shares its tensor.

    llama.cpp would apply the same delta, transposed, to the head, and abort. PEFT leaves a tied
    head as it is.

    Raises
    ------
    UnsupportedError
    """
    if architecture.head_is_embedding(config):
        raise UnsupportedError(
            f"changes {printable(delta.target)}, to which the head is tied: llama.cpp would "
            "abort, as it would use the delta for the head, too",
            path=adapter.path,
            hint=_MERGE_DENSE
            if architecture.head is None
            else f"{_MERGE}; or make the base with a head "
            "of its own (tie_word_embeddings false and lm_head.weight, a copy), and name that with "
            "--base",
        )


def refuse_vocabulary(
    delta: LoraDelta, tensor: str, adapter: Adapter, architecture: Architecture, config: Config
) -> None:
    """Refuse a delta of more or fewer tokens than the base has; tensor is GGUF's name.

    Raises
    ------
    UnsupportedError
    """
    if tensor not in ("output.weight", "token_embd.weight"):
        return
    own = delta.in_features if delta.orientation == "transposed" else delta.out_features
    if own != (tokens := config.integer("vocab_size")):
        raise _refused(
            adapter, delta.target, "changes",
            f"it has {own} tokens and the base {tokens}, and llama.cpp cannot resize the "
            "vocabulary",
            _remedy(adapter, architecture, config),
        )  # fmt: skip


def _is_the_bases_own(tensor: DenseTensor, stored: LazyTensor | None) -> bool:
    if not isinstance(stored, DenseTensor) or stored.shape != tensor.shape:
        return False
    same = numpy.array_equal(tensor.array(), stored.array().astype(tensor.array().dtype))
    for read in (tensor, stored):
        read.release()
    return same


def _remedy(adapter: Adapter, architecture: Architecture, config: Config) -> str:
    """Return what to do instead: merging to GGUF, where llama.cpp has a place for what comes out.

    Merged, a head that was tied becomes a tensor of its own if it or the embedding has changed.
    """
    changed = (*adapter.deltas, *adapter.replacements)
    unties = any(name.endswith(("lm_head.weight", "embed_tokens.weight")) for name in changed)
    headless = architecture.generates and architecture.head is None
    return _MERGE_DENSE if headless and unties else _MERGE


def _refused(adapter: Adapter, name: str, does: str, reason: str, remedy: str) -> UnsupportedError:
    return UnsupportedError(f"{does} {printable(name)}: {reason}", path=adapter.path, hint=remedy)
