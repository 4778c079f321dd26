"""Tiny models of every kind that adapters are trained on, and adapters that PEFT makes of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny_models import build, resized

IDS = torch.arange(1, 13)[None]
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "eos_token_id": 1, "bos_token_id": 0,
}  # fmt: skip
_SMALL = dict(
    SIZES, head_dim=8, intermediate_size=48, pad_token_id=None, num_local_experts=3,
    n_embd=32, n_head=2, n_positions=32, n_inner=None, tie_word_embeddings=False,
)  # fmt: skip


def _model(name: str, **changes: Any) -> torch.nn.Module:
    model: torch.nn.Module = build(name, resized(name, **_SMALL), **changes)
    return model


def llama(*, tied: bool = False, **sizes: int) -> torch.nn.Module:
    return _model("llama", tie_word_embeddings=tied, **sizes)


def llama_tied() -> torch.nn.Module:
    return llama(tied=True)


def qwen2() -> torch.nn.Module:
    return _model("qwen2")


def gpt2() -> torch.nn.Module:
    return _model("gpt2")


def mixtral() -> torch.nn.Module:
    return _model("mixtral", intermediate_size=24)


def qwen3_moe(*, intermediate: int = 24) -> torch.nn.Module:
    return _model("qwen3_moe", moe_intermediate_size=intermediate)


def qwen3_moe_square() -> torch.nn.Module:
    """Both of its expert parameters are (E, n, n) or (E, n, n/2): 2 x 16 = 32."""
    return qwen3_moe(intermediate=16)


def gpt_oss(*, intermediate: int = 24) -> torch.nn.Module:
    return _model("gpt_oss", intermediate_size=intermediate, layer_types=["full_attention"] * 2)


def gpt_oss_square() -> torch.nn.Module:
    return gpt_oss(intermediate=16)


def trained(
    build: Callable[[], torch.nn.Module],
    options: dict[str, Any],
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    saving: dict[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Save a model, and an adapter of it whose tensors are no longer what they began as."""
    torch.manual_seed(0)
    build().to(dtype).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = LoraConfig(**{"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM", **options})
    wrapped = get_peft_model(model, config)
    shake(wrapped)
    wrapped.save_pretrained(folder / "adapter", **(saving or {}))
    return folder / "base", folder / "adapter"


def shake(model: torch.nn.Module, size: float = 0.05) -> None:
    """Stand in for training: add noise to whatever trains."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)


def logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
    """Return what transformers computes, with PEFT's unmerged adapter."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(IDS).logits


def merged_by_peft(base: Path, adapter: Path) -> torch.nn.Module:
    """Return PEFT's merged model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
