"""Tiny models as bundles, and as the dense models that those dequantize to."""

from types import SimpleNamespace

import torch
import transformers

from loraformat.ops.convert.convert import convert

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

_SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=96, max_position_embeddings=64, pad_token_id=2,
    bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
)  # fmt: skip
CONFIGS = {
    "llama": ("llama", _SMALL),
    "llama-tied": ("llama", {**_SMALL, "tie_word_embeddings": True}),
    # bitsandbytes is wrong on a CPU where inputs are no multiple of 64
    "llama-wide": ("llama", {**_SMALL, "hidden_size": 64, "intermediate_size": 128}),
    "qwen2": ("qwen2", _SMALL),
    "gemma3": ("gemma3_text", {
        **_SMALL, "head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("gpt2", dict(
        n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64, bos_token_id=0,
        eos_token_id=1, n_inner=48, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
}  # fmt: skip


def make_base(name, directory):
    """Return paths: ``original`` (float32), ``bundle``, and ``dense``, what that dequantizes to."""
    kind, values = CONFIGS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **values), dtype=torch.float32
    )
    for key, parameter in model.named_parameters():
        mean = float(parameter.ndim == 1 and ("norm" in key or ".ln_" in key))
        torch.nn.init.normal_(parameter, mean=mean, std=0.15)
    paths = SimpleNamespace(
        original=directory / "original", bundle=directory / "bundle", dense=directory / "dense"
    )
    model.save_pretrained(paths.original)
    convert(paths.original, paths.bundle)
    convert(paths.bundle, paths.dense, to_format="safetensors")
    return paths


def load_dense(path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )


def tokens(seed=0, rows=2, length=12, vocabulary=96):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (rows, length), generator=random)
