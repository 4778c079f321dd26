"""Tiny models whose config ties the head, and whose file holds one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

IDS = torch.arange(5, 25)[None]
_COMMON: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=160, max_position_embeddings=64, pad_token_id=2,
    bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
)  # fmt: skip
_GEMMA = dict(_COMMON, head_dim=16, query_pre_attn_scalar=16, sliding_window=8)
_VISION = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
    image_size=28, patch_size=14,
)  # fmt: skip
#: By model type.
KINDS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen2": _COMMON,
    "gemma3_text": _GEMMA,
    "gemma3": dict(
        text_config=_GEMMA, vision_config=_VISION, mm_tokens_per_image=4, boi_token_index=90,
        eoi_token_index=91, image_token_index=92, tie_word_embeddings=True,
    ),
    "gpt2": dict(
        n_embd=64, n_layer=2, n_head=4, vocab_size=160, n_positions=64, bos_token_id=0,
        eos_token_id=1, tie_word_embeddings=True,
    ),
}  # fmt: skip


def auto_class(kind: str) -> Any:
    if kind == "gemma3":
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def make(kind: str, folder: Path, head: str) -> Path:
    """Write a model; ``head`` is "none", "equal" or "other"."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind])
    model = auto_class(kind).from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    (embedding,) = (
        name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight"))
    )
    if head != "none":
        values = tensors[embedding].clone() if head == "equal" else 0.1 * torch.randn(160, 64)
        place = "language_model.lm_head" if embedding.startswith("language_model") else "lm_head"
        save_file({**tensors, f"{place}.weight": values}, weights, {"format": "pt"})
    return folder


def opened(path: Path, adapter: Path | None = None, **options: Any) -> Any:
    kind = json.loads((path / "config.json").read_bytes())["model_type"]
    options = {"dtype": torch.float32, "attn_implementation": "eager", **options}
    model = auto_class(kind).from_pretrained(path, **options)
    return (model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapter(base: Path, folder: Path, *targets: str, **options: Any) -> torch.Tensor:
    """Write an adapter by PEFT; return the logits with it."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False, **options
    )
    model = peft.get_peft_model(opened(base), config).eval()
    model.save_pretrained(folder, save_embedding_layers=False)
    return logits(model)


def flags(path: Path) -> list[Any]:
    """What a config says, and the model within it, if there is one."""
    config = json.loads((path / "config.json").read_bytes())
    said = [config, config["text_config"]] if "text_config" in config else [config]
    return [one["tie_word_embeddings"] for one in said]
