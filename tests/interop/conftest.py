"""Tiny models of every architecture, written by transformers itself, once per run.

bitsandbytes on a CPU rewrites a 4-bit weight in place when a model in eval mode runs forward, and
computes with lossy scales from then on. So every model here runs in train mode, without dropout.
"""

import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel on the Hub
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

COMMON = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=96, max_position_embeddings=64, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
HEADS = dict(COMMON, head_dim=16)
VISION = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    image_size=28, patch_size=14,
)  # fmt: skip
CONFIGS = {
    "llama": COMMON,
    "llama-tied": dict(COMMON, tie_word_embeddings=True),
    "mistral": COMMON,
    "qwen2": COMMON,
    "qwen3": HEADS,
    "gemma2": HEADS,
    "gemma3_text": HEADS,
    "gemma3": dict(
        text_config=dict(HEADS), vision_config=VISION, mm_tokens_per_image=4,
        boi_token_index=90, eoi_token_index=91, image_token_index=92,
    ),
    "phi3": COMMON,
    "gpt2": dict(
        n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64, bos_token_id=1,
        eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "mixtral": dict(COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(
        HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        decoder_sparse_step=1, mlp_only_layers=[],
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Return a function: the directory of a dense float32 model of one architecture."""
    made = {}

    def make(architecture):
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp("model") / architecture
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(
                architecture.removesuffix("-tied"), **CONFIGS[architecture]
            )
            model = auto_class(architecture).from_config(config, dtype=torch.float32)
            for name, parameter in model.named_parameters():  # biases and norms begin constant
                if parameter.ndim == 1:
                    torch.nn.init.normal_(
                        parameter, mean=float("norm" in name or ".ln_" in name), std=0.1
                    )
            model.save_pretrained(made[architecture])
        return made[architecture]

    return make


def auto_class(architecture):
    if architecture == "gemma3":
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


@pytest.fixture
def load():
    """Return a function that opens a model with transformers, ready to run."""

    def open_model(path, architecture="llama", **options):
        model, info = auto_class(architecture).from_pretrained(
            path, output_loading_info=True, **options
        )
        problems = {kind: names for kind, names in info.items() if names}
        assert not problems, problems
        return model.train()

    return open_model


@pytest.fixture
def logits():
    """Return a function that runs a model on fixed tokens, and on an image if it sees."""
    tokens = torch.arange(5, 37).view(2, 16)
    images = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))

    def run(model):
        assert model.training
        with torch.no_grad():
            if model.config.model_type == "gemma3":
                mixed = tokens.clone()
                mixed[:, 2:6] = model.config.image_token_index
                seen = (mixed == model.config.image_token_index).long()
                return model(mixed, pixel_values=images, token_type_ids=seen).logits
            return model(tokens).logits

    return run


@pytest.fixture
def stored():
    """Return a function that reads every stored tensor of a directory, as flat bytes."""

    def read(path):
        found = {}
        for file in sorted(path.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                found[name] = (tensor.dtype, tuple(tensor.shape), data)
        return found

    return read
