"""Adapters that PEFT made after a resize of the vocabulary, in each form in which it saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.adapters import peft_models

#: Rows of the base's embedding: of 64 tokens, or padded to that from fewer.
ROWS = 64
IDS = torch.arange(1, 49).reshape(2, 24)


def gemma3() -> torch.nn.Module:
    config = Gemma3TextConfig(
        **peft_models.SIZES, head_dim=8, intermediate_size=48, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def wide() -> torch.nn.Module:
    """Return a model whose rows are whole blocks of 64, which bitsandbytes wants on a CPU."""
    sizes = {**peft_models.SIZES, "hidden_size": 64, "intermediate_size": 128}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": peft_models.llama,
    "llama tied": peft_models.llama_tied,
    "gemma3": gemma3,
    "gpt2": peft_models.gpt2,
}
BUILD = {**MODELS, "wide": wide}


def names(model: str) -> tuple[str, list[str]]:
    """Return what a model calls its embedding, and linears of it."""
    return ("wte", ["c_attn"]) if model == "gpt2" else ("embed_tokens", ["q_proj", "down_proj"])


#: By form: options of LoraConfig; E stands for the embedding, L for linears, N for new tokens.
FORMS: dict[str, dict[str, Any]] = {
    "saved by itself": {},
    "modules_to_save": {"modules_to_save": ["E", "lm_head"]},
    "modules_to_save, tied": {"modules_to_save": ["E", "lm_head"], "ensure_weight_tying": True},
    "embedding to save": {"modules_to_save": ["E"]},
    "head to save": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": {"E": "N"}},
    "tokens of both": {"trainable_token_indices": {"E": "N", "lm_head": "N"}},
    "tokens as a list": {"trainable_token_indices": "N"},
    "embedding targeted": {"target_modules": ["L", "E"]},
    "head targeted": {"target_modules": ["L", "lm_head"]},
    "both targeted": {"target_modules": ["L", "E", "lm_head"]},
}


def adapter(
    model: str, form: str, rows: int, folder: Path, saving: dict[str, Any] | None = None
) -> torch.nn.Module:
    """Save a base and an adapter that was made after a resize; return PEFT's model."""
    torch.manual_seed(0)
    base = BUILD[model]()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    base.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    base.resize_token_embeddings(rows)
    embedding, linears = names(model)
    new = [rows - 1, rows - 3]

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {filled(key): filled(one) for key, one in value.items()}
        if isinstance(value, list):
            return [n for v in value for n in (linears if v == "L" else [filled(v)])]
        return {"E": embedding, "N": new}.get(value, value) if isinstance(value, str) else value

    options = {"target_modules": linears, **filled(FORMS[form])}
    made = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    peft_models.shake(made, 0.1)
    made.save_pretrained(folder / "adapter", **(saving or {}))
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    return made.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of some tokens that every vocabulary has."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.double()


def reloaded(folder: Path, rows: int) -> torch.nn.Module:
    """Return the adapter as PEFT loads it on the base, once that is resized."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    base.resize_token_embeddings(rows)
    return PeftModel.from_pretrained(base, folder / "adapter").eval()


def opened(path: Path) -> torch.nn.Module:
    """Return a model as transformers opens it, in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
