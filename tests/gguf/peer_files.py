"""GGUF files by gguf-py alone, of a tiny llama: what our own writers are compared with."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

__all__ = ["tiny_llama", "write_peer_base", "write_peer_lora"]

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def tiny_llama(seed: int = 0, vocabulary: int = 320):
    """Return a random llama of two layers, float32, for evaluation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # sharp enough that mistakes show
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def gguf_name(name: str) -> str:
    """Return GGUF's name of a llama weight."""
    outside = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight",
               "model.norm.weight": "output_norm.weight"}  # fmt: skip
    if name in outside:
        return outside[name]
    layer, module = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{_NAMES[module]}.weight"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of Q or K as llama.cpp's rotation wants them."""
    shape = weight.shape
    return (
        weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    )


def write_peer_base(path: Path, model, kind=gguf.GGMLQuantizationType.F32, **options) -> Path:
    """Write a llama with a vocabulary of bytes and made-up words."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    words = [f"\u2581w{n:03}" for n in range(config.vocab_size - 259 - 26)]
    letters = [chr(97 + n) for n in range(26)]
    writer.add_token_list(
        ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *letters, *words]
    )
    writer.add_token_scores([0.0] * 259 + [-float(n) for n in range(26 + len(words))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (26 + len(words)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, tensor in model.state_dict().items():
        weight = tensor.float().numpy()
        for module, heads in (("q_proj", config.num_attention_heads),
                              ("k_proj", config.num_key_value_heads)):  # fmt: skip
            if module in name:
                weight = permuted(weight, heads)
        stored = gguf.GGMLQuantizationType.F32 if weight.ndim == 1 else kind
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight, stored), raw_dtype=stored)
    return _finish(writer, path)


def write_peer_lora(path: Path, pairs: dict[str, tuple[np.ndarray, np.ndarray]], alpha: float,
                    architecture: str = "llama") -> Path:  # fmt: skip
    """Write factors ``{"blk.0.ffn_up.weight": (a, b)}`` as a LoRA file."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, (a, b) in pairs.items():
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a, np.float32))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b, np.float32))
    return _finish(writer, path)


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
