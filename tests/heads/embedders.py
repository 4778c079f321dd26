"""Tiny embedding models: saved from a base class, without an output head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

import loraformat.demo

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SMALL = Path(loraformat.demo.__file__).parent / "small_model"
IDS = [5, 9, *range(40, 60)]
_COMMON: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, pad_token_id=0,
    vocab_size=json.loads((SMALL / "config.json").read_bytes())["vocab_size"],
    tie_word_embeddings=False,
)  # fmt: skip
_BERT = {k: v for k, v in _COMMON.items() if k not in ("num_key_value_heads", "head_dim")}
_GEMMA = dict(
    _COMMON, query_pre_attn_scalar=16, sliding_window=64, tie_word_embeddings=True
)  # fmt: skip
#: By the class that it is saved from: the class of its config, its members, targets of an adapter.
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "LlamaModel": ("LlamaConfig", _COMMON, ["q_proj", "down_proj"]),
    "MistralModel": ("MistralConfig", _COMMON, ["q_proj", "down_proj"]),
    "Qwen3Model": ("Qwen3Config", _COMMON, ["q_proj", "down_proj"]),
    "Phi3Model": ("Phi3Config", _COMMON, ["qkv_proj", "down_proj"]),
    "Gemma3TextModel": ("Gemma3TextConfig", _GEMMA, ["q_proj", "down_proj"]),
    "BertModel": ("BertConfig", dict(_BERT, tie_word_embeddings=True), ["query", "value"]),
}
#: How it lies there: as its class saves it; as Qwen3-Embedding, whose config names the class with a
#: head; with the prefix of that class before each name.
FORMS = ("base class", "class with a head", "prefix")
CASES = [(kind, "base class") for kind in KINDS] + [
    (kind, form) for kind in ("LlamaModel", "Qwen3Model") for form in FORMS[1:]
]


def make(kind: str, form: str, folder: Path, pooling: str | None = None) -> Path:
    """Write a model in float32, its norms not 1, with a tokenizer."""
    torch.manual_seed(0)
    config_class, members, _ = KINDS[kind]
    model = getattr(transformers, kind)(getattr(transformers, config_class)(**members))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL / name, folder / name)
    if form == "class with a head":
        edit_config(folder, architectures=[kind.replace("Model", "ForCausalLM")])
    if form == "prefix":
        tensors = load_file(folder / "model.safetensors")
        renamed = {f"model.{name}": values for name, values in tensors.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        fields = {"word_embedding_dimension": 64, f"pooling_mode_{pooling}": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(fields))
    return folder


def edit_config(folder: Path, **members: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **members}))


def opened(path: Path, adapter: Path | None = None, auto: Any = transformers.AutoModel) -> Any:
    model = auto.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    return model.eval()


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model(input_ids=torch.tensor([IDS]), output_hidden_states=True)
    return output.hidden_states[-1][0].double()


def states(path: Path, adapter: Path | None = None) -> torch.Tensor:
    return hidden(opened(path, adapter))


def adapter(
    base: Path,
    folder: Path,
    targets: list[str],
    task: str = "FEATURE_EXTRACTION",
    auto: Any = transformers.AutoModel,
) -> torch.Tensor:
    """Write an adapter by PEFT; return the hidden states with it."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type=task, r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False
    )  # fmt: skip
    model = peft.get_peft_model(opened(base, auto=auto), config).eval()
    model.save_pretrained(folder, save_embedding_layers=False)
    return hidden(model)
