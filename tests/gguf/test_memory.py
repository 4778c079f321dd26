"""Bases stream to GGUF and back: the peak depends on the largest tensor, not on their number."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from bases import SMALL, TOKENIZER
from safetensors.torch import save_file

from loraformat.ops.convert.convert import convert
from tests.anonymous_memory import grown

MB = 1_000_000
WIDTH = 1024
MATRIX = 4 * WIDTH * WIDTH  # in float32
PROJECTIONS = [
    *(f"self_attn.{letter}_proj" for letter in "qkvo"),
    *(f"mlp.{word}_proj" for word in ("gate", "up", "down")),
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def write_llama(directory, layers, width=WIDTH):
    """A llama of equal square matrices in bfloat16, and the small model's tokenizer."""
    directory.mkdir()
    random = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(2048, width, generator=random).bfloat16(),
        "model.norm.weight": torch.ones(width),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in PROJECTIONS:
            tensors[f"{prefix}{name}.weight"] = torch.randn(
                width, width, generator=random
            ).bfloat16()
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(width)
    save_file(tensors, directory / "model.safetensors")
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], hidden_act="silu",
        hidden_size=width, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, head_dim=64,
        max_position_embeddings=64, rms_norm_eps=1e-5, vocab_size=2048, tie_word_embeddings=True,
    )  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER:
        shutil.copy(SMALL / file, directory / file)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models of 60 KB, 37 and 67 MB, as safetensors, bundles and GGUF files."""
    folder = tmp_path_factory.mktemp("models")
    for name, layers, width in (("tiny", 1, 64), ("small", 2, WIDTH), ("large", 4, WIDTH)):
        write_llama(folder / name, layers, width)
        convert(folder / name, folder / f"{name}-bundle")
        convert(folder / name, folder / f"{name}.gguf", dtype="q8_0")
    return folder


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("{}", ["--to", "gguf"]),
        ("{}-bundle", ["--to", "gguf", "--dtype", "q8_0"]),
        ("{}.gguf", ["--to", "loraformat"]),
        ("{}.gguf", ["--to", "safetensors", "--dtype", "f32"]),
    ],
    ids=["dense to f16", "NF4 to q8_0", "q8_0 to NF4", "q8_0 to f32"],
)
def test_memory_does_not_grow_with_the_model(models, source, options, tmp_path):
    # Reading, converting and writing overlap by chance; what a model's size adds comes each time.
    names = ["tiny", *["small"] * 5, *["large"] * 5]
    calls = [
        ["convert", models / source.format(name), tmp_path / f"{number}.out", *options]
        for number, name in enumerate(names)
    ]
    found = grown(*calls)
    small, large = max(found[:5]), min(found[5:])
    assert max(found) < 4 * MATRIX + 30 * MB, "of the promised 512 MB"
    assert large < small + MATRIX, "14 matrices more, and never one of them more in memory"
