"""Tiny models of every architecture, written by transformers itself, once per run.

bitsandbytes on a CPU rewrites a 4-bit weight in place when a model in eval mode runs forward, and
computes with lossy scales from then on. So every model here runs in train mode, without dropout.
"""

import logging

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_models import WIDE, auto_class, make_model, resized

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel on the Hub

#: bitsandbytes' CPU kernels and ours sum in other orders: small weights, small differences.
STD = 0.02
DROPOUTS = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Return a function: the directory of a dense float32 model of one architecture."""
    made = {}

    def make(architecture):
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp("model") / architecture
            values = resized(architecture, num_hidden_layers=2, **WIDE)
            changes = DROPOUTS if architecture == "gpt2" else {}
            make_model(architecture, made[architecture], values, std=STD, **changes)
        return made[architecture]

    return make


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
