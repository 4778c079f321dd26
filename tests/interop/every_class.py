"""A tiny model of every class in transformers that reads or writes text, by task."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from tests.adapters import moe_models
from tests.train import causal_models

CLASSES: dict[str, tuple[Any, str]] = {
    "causal": (transformers.AutoModelForCausalLM, "CAUSAL_LM"),
    "masked": (transformers.AutoModelForMaskedLM, "MASKED_LM"),
    "seq2seq": (transformers.AutoModelForSeq2SeqLM, "SEQ_TO_SEQ_CAUSAL_LM"),
}
#: Rows of whole blocks: bitsandbytes decodes others wrongly on a CPU.
_ROWS = dict.fromkeys(
    ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
     "q_lora_rank", "kv_lora_rank", "o_lora_rank", "ffn_hidden_size", "expert_ffn_hidden_size",
     "moe_shared_expert_intermediate_size", "shared_intermediate_size", "ffn_dim", "n_inner", "dff",
     "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "d_ff", "linear_head_dim"),
    64,
) | dict(d_kv=16)  # fmt: skip
EAGER = dict(dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")


def all_types() -> list[tuple[str, str]]:
    """List the classes: a task, and a model type."""
    return [
        (task, model_type)
        for task, (_, name) in CLASSES.items()
        for model_type in sorted(getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES"))
    ]


def config_of(task: str, model_type: str) -> Any:
    """Return a tiny config whose weights have rows of whole blocks, without dropout."""
    config = causal_models.config_of(model_type, **_ROWS, is_decoder=task == "causal")
    _without_dropout(config)
    return config


def _without_dropout(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            _without_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def make(task: str, model_type: str) -> Any:
    """Return a float32 model with seeded weights."""
    torch.manual_seed(0)
    model = CLASSES[task][0].from_config(config_of(task, model_type), **EAGER)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and parameter.ndim == 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1 + mean)
    return model


def opened(task: str, path: Any) -> Any:
    """Open a model; no tensor is missing, unexpected, or of another shape."""
    model, info = CLASSES[task][0].from_pretrained(path, output_loading_info=True, **EAGER)
    assert not any(info.values()), info
    return model.train()  # bitsandbytes changes its weights in eval mode on a CPU


def logits(task: str, model: Any) -> torch.Tensor:
    """Return the logits of a few tokens."""
    more: dict[str, Any] = {
        "causal": dict(use_cache=False),
        "masked": {},
        "seq2seq": dict(decoder_input_ids=moe_models.TOKENS),
    }[task]
    torch.manual_seed(0)  # some classes hash or sample
    with torch.no_grad():
        found: torch.Tensor = model(moe_models.TOKENS, **more).logits
    return found
