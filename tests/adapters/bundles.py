"""A bundle and a real PEFT adapter for it, made once."""

import json

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loraformat.ops.convert.convert import convert

IDS = torch.arange(12)[None]


def build(directory):
    """Write ``base`` (dense), ``bundle`` and ``adapter`` into a directory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, tie_word_embeddings=False,
        eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory / "base")
    convert(directory / "base", directory / "bundle")
    save_adapter(model, directory / "adapter", seed=1)


def save_adapter(model, path, seed=1, **options):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], **options}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(path)
    wrapped.unload()
    (path / "notes").mkdir()
    (path / "notes" / "training.txt").write_text("three epochs\r\n")


def logits(base, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    # In training mode bitsandbytes neither repacks its weights nor are there layers that differ.
    return model.train()(IDS).logits.detach()


def name_base(path, fingerprint):
    """Let a PEFT adapter say that it was made for a base."""
    weights = path / "adapter_model.safetensors"
    metadata = {"format": "pt", "loraformat.base_fingerprint": fingerprint}
    save_file(load_file(weights), weights, metadata)


def manifest(bundle):
    return json.loads((bundle / "loraformat.json").read_text())
